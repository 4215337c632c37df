"""`glm-train validate`: everything that can be wrong before a model is loaded."""

from __future__ import annotations

from glm_training.cli.messages import report_error
from glm_training.cli.training import EXIT_CONFIG
from glm_training.config import ConfigError, load_config


def validate(paths: list[str], overrides: list[str], mode: str | None) -> int:
    """0 when the file, its data and its rewards are fine, else 2 with every problem of the first kind that fails."""
    try:
        config = load_config(paths, overrides, mode=mode)
    except ConfigError as error:
        report_error(str(error))
        return EXIT_CONFIG
    from glm_training.engine import setup
    from glm_training.engine.errors import USER_ERRORS
    from glm_training.engine.run_directory import occupied_message
    from glm_training.rewards import RewardError
    from glm_training.trainers.run import prepare
    from glm_training.utils.console import Console
    from glm_training.utils.distributed import World

    try:
        prepared = prepare(config, World(), loads=False)  # on the CPU: a GPU may be elsewhere
    except (*USER_ERRORS, RewardError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    dataset, held_out = prepared.dataset, prepared.held_out
    held = occupied_message(config) if prepared.resume is None else None
    for note in [*prepared.notes, *([] if held is None else [held])]:
        Console().line(f"note: {note}")
    Console().line(f"{' with '.join(paths)} is fine: {', '.join(setup.data_told(config, dataset, held_out))}")
    return 0
