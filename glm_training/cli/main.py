"""`glm-train`: train, validate, plan, data, download, sample, evaluate, export, report, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from glm_training import __version__
from glm_training.cli import training
from glm_training.cli.arguments import Parser, gather_files, place, resuming, text, whole_number
from glm_training.cli.doctor import DESCRIPTION as DOCTOR_DESCRIPTION
from glm_training.cli.doctor import add_doctor_arguments
from glm_training.cli.drawing_arguments import add_drawing_arguments
from glm_training.cli.evaluation_arguments import DESCRIPTION, add_evaluation_arguments
from glm_training.cli.export import DESCRIPTION as EXPORT_DESCRIPTION
from glm_training.cli.export import add_export_arguments
from glm_training.cli.messages import hide_advice_on_cpu_kernels
from glm_training.cli.plan import DESCRIPTION as PLAN_DESCRIPTION
from glm_training.cli.plan import add_plan_arguments
from glm_training.cli.report import DESCRIPTION as REPORT_DESCRIPTION
from glm_training.cli.report import add_report_arguments
from glm_training.cli.stopping import stoppable
from glm_training.utils.redaction import mask_logs_and_tracebacks
from glm_training.utils.streams import guard_standard_streams

TRAIN = "train as a YAML file says (the same as python train.py)"
BESIDE_TRAINING = {
    "validate": (
        "check a YAML file, its data and its rewards without training",
        "Check a YAML file, decode all of its data and load its rewards, without loading the model. Tells every "
        "problem at once and exits with 2 if there is one.",
    ),
    "data": (
        "show what a YAML file's data are: sizes, captions, copies, faults, a contact sheet",
        "Read all data of a YAML file and show what was understood. Writes a contact sheet to the folder data in "
        "output_dir, and overwrites nothing. Exits with 2 where a run would not start.",
    ),
    "download": (
        "fetch the model and the metrics' files that a YAML file needs",
        "Fetch what a run needs from elsewhere: the model, and the files of its metrics, with their sizes and "
        "checksums. What is here stays; a download that broke off goes on. For machines that train without a network: "
        "run it where there is one, with the same HF_HOME and TORCH_HOME.",
    ),
}
"""Commands that read a configuration as `train` does: help in the list, and of each."""
LOADING = ("validate", "sample", "evaluate", "export")
"""Commands that load a model or a metric, besides `train`: before that, their libraries have to fit."""


def main() -> None:
    """Entry point."""
    guard_standard_streams()
    mask_logs_and_tracebacks()
    hide_advice_on_cpu_kernels()
    parser = Parser(
        prog="glm-train",
        description="Post-train GLM-Image and SDXL, train VGT: rewards, finetuning, preferences, distillation.",
        epilog="glm-train COMMAND --help tells more of each",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_files = {"train": commands.add_parser("train", help=TRAIN, description="Train as a YAML file says.")}
    training.add_arguments(of_files["train"])
    for name, (short, description) in BESIDE_TRAINING.items():
        of_files[name] = commands.add_parser(name, help=short, description=description)
        training.add_config_arguments(of_files[name])
    short = "work out what a YAML file's run takes of memory, disk and time"
    of_files["plan"] = commands.add_parser("plan", help=short, description=PLAN_DESCRIPTION)
    add_plan_arguments(of_files["plan"])
    sample = commands.add_parser(
        "sample",
        help="draw images with a model",
        description="Draw images with a model, a run or a checkpoint, with adapters or without. The same command again "
        "draws what is missing. In brackets: what is taken without the option.",
    )
    _sample_arguments(sample)
    evaluate = commands.add_parser(
        "evaluate",
        help="run a benchmark: draw its pictures, judge them, make figures",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_evaluation_arguments(evaluate)
    short = "write a checkpoint as a pipeline, adapters or weights for other programs"
    add_export_arguments(commands.add_parser("export", help=short, description=EXPORT_DESCRIPTION))
    short = "make the page of a run; of several, say which is better"
    add_report_arguments(commands.add_parser("report", help=short, description=REPORT_DESCRIPTION))
    doctor = commands.add_parser("doctor", help="look at what this machine lacks", description=DOCTOR_DESCRIPTION)
    add_doctor_arguments(doctor)
    if len(sys.argv) == 1:
        parser.print_help(sys.stderr)
        sys.exit(training.EXIT_CONFIG)
    words = resuming(sys.argv[1:])
    arguments, rest = parser.parse_known_args(words)
    stray = [word for word in rest if word.startswith("-") or arguments.command not in (*of_files, "doctor")]
    if stray:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:  # overrides after an option that follows other overrides; subparsers cannot mix them by themselves
        arguments.overrides += rest
    if arguments.command in of_files:
        gather_files(of_files[arguments.command], arguments, words)
    elif arguments.command == "doctor" and (arguments.config or arguments.overrides):
        gather_files(doctor, arguments, words)
    sys.exit(stoppable(lambda: _run(arguments)))


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, kind: Callable[[str], Any], default: Any, metavar: str, meaning: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{meaning} (%(default)s)")

    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=text, action="append", default=[], help="give it again for more")
    prompts.add_argument(
        "--prompts",
        type=place,
        metavar="FILE",
        help="of a text with a prompt on each line, JSON lines, a JSON list or a CSV; records may name a picture to "
        "edit (source)",
    )
    parser.add_argument(
        "--image",
        "--source",
        dest="source",
        type=place,
        action="append",
        default=[],
        metavar="IMAGE",
        help="to edit, or for a VGT autoencoder alone to draw again: one for all prompts, one for each, or a folder "
        "with 0.png for the first",
    )
    meaning = "pictures, samples.jsonl and grids; what is there stays, and is not drawn again"
    add("--out", place, "samples", "FOLDER", meaning)
    images = whole_number(1, 10_000)
    parser.add_argument("--samples", type=images, metavar="N", help="pictures of each prompt (1)")
    parser.add_argument("--plans", type=images, metavar="N", help="the same, of GLM-Image: plans of each prompt (1)")
    parser.add_argument("--renders", type=images, metavar="M", help="GLM-Image: pictures of each plan (1)")
    add_drawing_arguments(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        return training.run(arguments)
    if arguments.command in LOADING:
        lacking = training.tell_lacking()
        if lacking is not None:
            return lacking
    if arguments.command == "validate":
        from glm_training.cli.validate import validate

        return validate(arguments.config, arguments.overrides, arguments.mode)
    if arguments.command == "plan":
        from glm_training.cli.plan import plan

        return plan(arguments)
    if arguments.command == "download":
        from glm_training.cli.download import download

        return download(arguments.config, arguments.overrides, arguments.mode)
    if arguments.command == "data":
        from glm_training.cli.data import data

        return data(arguments.config, arguments.overrides, arguments.mode)
    if arguments.command == "evaluate":
        from glm_training.cli.evaluate import evaluate

        return evaluate(arguments)
    if arguments.command == "export":
        from glm_training.cli.export import export

        return export(arguments)
    if arguments.command == "report":
        from glm_training.cli.report import report

        return report(arguments)
    if arguments.command == "doctor":
        from glm_training.cli.doctor import doctor

        return doctor(arguments)
    from glm_training.cli.sample import sample

    return sample(arguments)


if __name__ == "__main__":
    main()
