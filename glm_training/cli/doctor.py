"""`glm-train doctor`, which is `test_installation.py` too: what this machine lacks for training."""

from __future__ import annotations

import argparse
import json
import sys

from glm_training import __version__
from glm_training.cli.arguments import Parser, gather_files, number
from glm_training.cli.messages import report_error
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED, add_config_arguments
from glm_training.doctor.processes import LONGEST
from glm_training.utils.redaction import mask_logs_and_tracebacks
from glm_training.utils.streams import guard_standard_streams

DESCRIPTION = (
    "Look at this machine: versions of the libraries, GPU and driver, disk, OCR, metrics and weights, then train the "
    "tiny model for a step, by one process and by two. With a configuration, what that needs alone. What fails has the "
    "command that mends it. Changes nothing, and leaves nothing behind. Exits with 1 where something fails."
)
LIMIT = 300.0
"""Seconds: a step of the tiny model with its imports takes a tenth of it on two busy cores."""


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, which may be left out, and how far to look."""
    add_config_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="train nothing")
    parser.add_argument(
        "--time-limit",
        type=number(1, LONGEST),
        default=LIMIT,
        metavar="SECONDS",
        help=f"after which a check is stopped, and counts as failed ({LIMIT:g})",
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def doctor(arguments: argparse.Namespace) -> int:
    """0 where nothing fails, 1 where something does, 2 for a configuration that cannot be used."""
    from glm_training.doctor.commands import Asked
    from glm_training.doctor.examination import examine
    from glm_training.utils.console import Console

    asked = Asked(tuple(arguments.config or ()), tuple(arguments.overrides), arguments.mode)
    config = None
    if asked.paths:
        from glm_training.config import ConfigError, load_config

        try:
            config = load_config(asked.paths, asked.overrides, mode=asked.mode)
        except ConfigError as error:
            report_error(str(error))
            return EXIT_CONFIG
    console = Console()
    if not arguments.json:
        console.line(f"glm_training {__version__}, Python {sys.version.split()[0]}")
    found = []
    for finding in examine(asked, config, limit=arguments.time_limit, quick=arguments.quick):
        found.append(finding)
        for line in () if arguments.json else finding.lines():
            console.line(line)
    faults = sum(finding.status == "failed" for finding in found)
    if arguments.json:
        told = {"version": __version__, "ok": not faults, "findings": [finding.as_dict() for finding in found]}
        console.line(json.dumps(told, indent=1))
    elif faults:
        console.line(f"{faults} to mend: type what stands after $, then look again")
    else:
        console.line("everything is here" if config is None else "everything that this configuration needs is here")
    return EXIT_FAILED if faults else 0


def main() -> None:
    """Entry point of test_installation.py."""
    guard_standard_streams()
    mask_logs_and_tracebacks()
    parser = Parser(description=DESCRIPTION)
    add_doctor_arguments(parser)
    arguments = parser.parse_intermixed_args()
    if arguments.config or arguments.overrides:
        gather_files(parser, arguments, sys.argv[1:])
    from glm_training.cli.stopping import stoppable

    sys.exit(stoppable(lambda: doctor(arguments)))
