"""`glm-train`: train, validate, sample."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from glm_training import __version__
from glm_training.cli import training
from glm_training.cli.arguments import Parser, gather_files, number, place, text, whole_number
from glm_training.cli.stopping import stoppable
from glm_training.utils.redaction import mask_logs_and_tracebacks
from glm_training.utils.streams import guard_standard_streams


def main() -> None:
    """Entry point."""
    guard_standard_streams()
    mask_logs_and_tracebacks()
    parser = Parser(
        prog="glm-train",
        description="Post-train GLM-Image and SDXL: rewards, supervised finetuning, preferences, distillation.",
        epilog="glm-train COMMAND --help tells more of each",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train as a YAML file says (the same as python train.py)",
        description="Train as a YAML file says.",
    )
    training.add_arguments(train)
    validate = commands.add_parser(
        "validate",
        help="check a YAML file, its data and its rewards without training",
        description="Check a YAML file, decode all of its data and load its rewards, without loading the model. Tells "
        "every problem at once and exits with 2 if there is one.",
    )
    training.add_config_arguments(validate)
    sample = commands.add_parser(
        "sample",
        help="draw images with a model",
        description="Draw images with a model, a checkpoint's pipeline folder, or a model with trained adapters. "
        "In brackets: what is taken without the option.",
    )
    _sample_arguments(sample)
    arguments, rest = parser.parse_known_args()
    stray = [word for word in rest if word.startswith("-") or arguments.command == "sample"]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:  # overrides after an option that follows other overrides; subparsers cannot mix them by themselves
        arguments.overrides += rest
    if arguments.command != "sample":
        gather_files(train if arguments.command == "train" else validate, arguments)
    sys.exit(stoppable(lambda: _run(arguments)))


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, kind: Callable[[str], Any], default: Any, metavar: str, meaning: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{meaning} (%(default)s)")

    parser.add_argument("--prompt", type=text, action="append", required=True, help="give it again for more images")
    parser.add_argument(
        "--source", type=place, action="append", default=[], metavar="IMAGE", help="to edit; one per --prompt"
    )
    add("--model", place, "tiny", "MODEL", "tiny, a pipeline folder (as in a checkpoint), or a hub id")
    parser.add_argument(
        "--family", choices=("glm_image", "sdxl"), help="what kind of model it is (what its folder says, or glm_image)"
    )
    parser.add_argument(
        "--lora",
        type=place,
        action="append",
        default=[],
        metavar="PART=FOLDER",
        help="adapters of ar, dit or unet",
    )
    add("--out", place, "samples", "FOLDER", "where the pictures go; those that are there stay")
    for side in ("--height", "--width"):
        pixels = whole_number(8, 8192)
        parser.add_argument(side, type=pixels, metavar="PIXELS", help="a multiple of 32 (the model's own size)")
    add("--samples", whole_number(1, 10_000), 1, "N", "images per prompt")
    steps = "denoising steps (50, or what a model was distilled to)"
    parser.add_argument("--steps", type=whole_number(1, 1000), metavar="N", help=steps)
    guidance = "1 = off (1.5; sdxl: 5; distilled: 1)"
    parser.add_argument("--guidance", type=number(1, 1000), metavar="SCALE", help=guidance)
    add("--temperature", number(0.01, 100), 0.9, "T", "of the AR half's sampling")
    add("--top-p", number(1e-6, 1), 0.75, "P", "nucleus of the AR half's sampling")
    add("--seed", whole_number(0, 2**63 - 1), 0, "N", "same seed, same images")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (bfloat16 on a GPU, else float32)")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        return training.run(arguments)
    if arguments.command == "validate":
        from glm_training.cli.validate import validate

        return validate(arguments.config, arguments.overrides, arguments.mode)
    from glm_training.cli.sample import sample

    return sample(arguments)


if __name__ == "__main__":
    main()
