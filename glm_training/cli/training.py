"""`train`: the arguments that every way of starting a run shares, and the run itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from glm_training.cli.arguments import Parser, gather_files, resuming
from glm_training.cli.messages import hide_advice_on_cpu_kernels
from glm_training.utils.redaction import mask_logs_and_tracebacks
from glm_training.utils.streams import guard_standard_streams

if TYPE_CHECKING:
    from glm_training.config import Config

EXIT_CONFIG = 2
EXIT_FAILED = 1
EXIT_NON_FINITE = 3
EXIT_MONITOR = 4

LAUNCHED = {"WORLD_SIZE", "SLURM_NTASKS"}
"""Variables of the environment without which this is no process among others."""

EXAMPLES = """\
examples:
  {program} --config configs/quickstart.yaml
  {program} --config configs/quickstart.yaml training.max_steps=100
  {program} --config configs/quickstart.yaml --resume
  {program} --config configs/quickstart.yaml --resume auto
  {program} --config configs/t2i_training.yaml \\
      --config configs/recipes/gspo.yaml

--resume auto is for jobs that are started again unattended. Everything in the
file, the data and the rewards is checked before anything is trained (glm-train
validate does only that). Every key: docs/configuration.md. The run directory is
the file's output_dir, by default runs/<name of the file>, of several files
runs/<name>-<name>.

exit codes:
  0              done
  1              the run failed
  2              configuration, data or the run directory are at fault
  3              values were not finite
  4              a monitor stopped the run after saving
                 (reward.monitors.action: stop)
  130, 143       stopped by SIGINT (Ctrl-C) or SIGTERM: a run that had begun to
                 train has saved
  129, 138, 140  the same by SIGHUP (the terminal has gone), SIGUSR1 or SIGUSR2
"""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a configuration: the file, the mode and the overrides."""
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file of the run; give another to lay it over the first, as one of configs/recipes",
    )
    parser.add_argument(
        "--mode", choices=("t2i", "i2i"), help="text to image or image to image, whatever training.mode says"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE | key.path=value",
        help="the YAML file, as after --config; any key of it with the value to take instead, as in "
        "training.max_steps=100 seed=7",
    )


def add_arguments(parser: argparse.ArgumentParser, *, component: str | None = None) -> None:
    """The arguments of a training run. `component` is fixed for train_ar.py and train_dit.py."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES.format(program=parser.prog)
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="latest|auto|FOLDER",
        help="continue the run in output_dir from its newest whole checkpoint; auto: if it has one, else start; FOLDER:"
        " from that checkpoint, or the newest of the run in it",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start although output_dir holds a run: that is renamed, whole, to NAME.old-1 beside it",
    )
    if component is None:
        parser.add_argument(
            "--train_both", action="store_true", help="train both halves, whatever model.component says"
        )


def run(arguments: argparse.Namespace, *, component: str | None = None) -> int:
    """Loads the configuration and trains; returns the exit code.

    0 done; 1 the run failed; 2 configuration or data are at fault (nothing was started, or data can no longer be read);
    3 values were not finite; 4 a monitor stopped the run after saving; 128 + the number of the signal that stopped it,
    after saving.
    """
    from glm_training.config import ConfigError, load_config

    overrides = list(arguments.overrides)
    resume, overwrite = arguments.resume, arguments.overwrite
    if resume is not None and overwrite:
        return _cannot_start(
            "--resume continues the run that is there, --overwrite sets it aside: give one of the two", EXIT_CONFIG
        )
    if resume not in (None, "auto"):  # which leaves the file's own `checkpoint.resume_from` for a run that starts
        overrides.append(f"checkpoint.resume_from={json.dumps(resume, ensure_ascii=False)}")  # a text, whatever it is
    if component is None and arguments.train_both:
        component = "both"
    try:
        config = load_config(arguments.config, overrides, mode=arguments.mode, component=component)
    except ConfigError as error:
        return _cannot_start(str(error), EXIT_CONFIG)
    return _train(config, overwrite=overwrite, auto=resume == "auto")


def _cannot_start(message: str, code: int) -> int:
    """Tells why this process cannot start, and the run's other processes too: they would wait for it."""
    from glm_training.cli.messages import report_error

    if LAUNCHED & os.environ.keys():
        from glm_training.utils.launch import DistributedError, announce_fault

        try:
            announce_fault(message)
        except DistributedError as error:
            report_error(str(error), everywhere=True)
            return code
    report_error(message)
    return code


def tell_lacking() -> int | None:
    """Tells which libraries are missing, too old or of another build; the exit code for that, None where all fit."""
    from glm_training.utils.requirements import check_requirements

    try:
        check_requirements()
    except ImportError as error:
        return _cannot_start(str(error), EXIT_FAILED)
    return None


def _train(config: Config, *, overwrite: bool = False, auto: bool = False) -> int:
    lacking = tell_lacking()
    if lacking is not None:
        return lacking
    from glm_training.checkpoint.state_tree import CheckpointError
    from glm_training.cli.messages import hide_progress_bars, report_error
    from glm_training.engine.errors import USER_ERRORS, DataLostError, NonFiniteError, TrainingError
    from glm_training.rewards import RewardError
    from glm_training.trainers.run import run_training
    from glm_training.utils.distributed import DistributedError

    hide_progress_bars()
    try:
        result = run_training(config, overwrite=overwrite, auto=auto)
    except DistributedError as error:
        report_error(str(error), everywhere=True)
        return EXIT_CONFIG
    except (DataLostError, *USER_ERRORS) as error:
        report_error(str(error))
        return EXIT_CONFIG
    except TrainingError as error:
        report_error(str(error), everywhere=not error.shared)
        return EXIT_NON_FINITE if isinstance(error, NonFiniteError) else EXIT_FAILED
    except (RewardError, CheckpointError) as error:
        report_error(str(error), everywhere=True)
        return EXIT_FAILED
    if result.halted is not None:
        report_error(f"{result.halted}. A checkpoint was saved; --resume continues once that limit is changed")
        return EXIT_MONITOR
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def main(component: str | None = None) -> None:
    """Entry point of train.py, train_ar.py and train_dit.py."""
    guard_standard_streams()
    mask_logs_and_tracebacks()
    hide_advice_on_cpu_kernels()
    what = {None: "GLM-Image", "ar": "GLM-Image's AR half", "dit": "GLM-Image's DiT half"}[component]
    parser = Parser(description=f"Post-train {what} as a YAML file says.")
    add_arguments(parser, component=component)
    words = resuming(sys.argv[1:])
    arguments = parser.parse_intermixed_args(words)
    gather_files(parser, arguments, words)
    from glm_training.cli.stopping import stoppable

    sys.exit(stoppable(lambda: run(arguments, component=component)))
