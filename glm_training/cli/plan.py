"""`glm-train plan`: what a run takes of memory, disk and time, before anything is downloaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from glm_training.cli.arguments import number, whole_number
from glm_training.cli.messages import report_error
from glm_training.cli.training import EXIT_CONFIG, add_config_arguments

if TYPE_CHECKING:
    from glm_training.planning.plan import Card

EXIT_TOO_LARGE = 1

DESCRIPTION = (
    "Work out, before anything is downloaded, what a run takes: parameters, memory of each phase and GPU, samples and "
    "updates of a step, checkpoints, days; and what to change where it does not fit. Exits with 1 where it does not "
    "fit on the GPU that is named or found."
)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and the machine that it is planned for."""
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=whole_number(1, 65536), default=1, metavar="N", help="GPUs of the run (1)")
    parser.add_argument(
        "--gpu-memory", type=number(0.1, 100_000), metavar="GIB", help="memory of each; else that of the GPU here"
    )
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp"), help="how several share the work; else distributed.strategy"
    )
    parser.add_argument("--shards", type=whole_number(1, 65536), metavar="N", help="GPUs that share one model by fsdp")
    parser.add_argument(
        "--rate", type=number(1e-9, 1e9), metavar="N", help="images per second of a GPU; else that of the run's own log"
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def plan(arguments: argparse.Namespace) -> int:
    """0 where it fits, or where no GPU is named or found; 1 where it does not; 2 for a configuration or a model that
    cannot be planned."""
    from glm_training.config import ConfigError, load_config

    try:
        config = load_config(arguments.config, arguments.overrides, mode=arguments.mode)
    except ConfigError as error:
        report_error(str(error))
        return EXIT_CONFIG
    from glm_training.engine.errors import SettingsError
    from glm_training.models.loading import ModelLoadError
    from glm_training.planning.page import page
    from glm_training.planning.plan import make_plan
    from glm_training.utils.console import Console

    try:
        found = make_plan(
            config,
            gpus=arguments.gpus,
            card=_card(arguments.gpu_memory),
            rate=arguments.rate,
            strategy=arguments.strategy,
            shards=arguments.shards,
        )
    except (ModelLoadError, SettingsError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    lines = [found.as_json()] if arguments.json else page(found, " with ".join(arguments.config))
    for line in lines:
        Console().line(line)
    return EXIT_TOO_LARGE if found.fits is False else 0


def _card(named: float | None) -> Card:
    """The GPU that is named, else the smallest here."""
    import torch

    from glm_training.planning.plan import Card

    if named is not None:
        return Card(named * 2**30, "as named")
    if not torch.cuda.is_available():
        return Card(None, "there is no GPU here; name its memory with --gpu-memory")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    smallest = min(cards, key=lambda card: card.total_memory)
    return Card(float(smallest.total_memory), smallest.name)
