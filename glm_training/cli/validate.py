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
    from glm_training.data import DataError
    from glm_training.engine import setup
    from glm_training.engine.held_out_metrics import held_out_metrics
    from glm_training.models.loading import ModelLoadError
    from glm_training.rewards import RewardError
    from glm_training.trainers.run import trainer_type
    from glm_training.utils.console import Console
    from glm_training.utils.distributed import World

    notes: list[str] = []
    try:
        dataset, held_out = trainer_type(config).build_data(config)
        if setup.scores(config):
            named = setup.datasets_to_score(config, dataset, held_out)
            _, notes = setup.build_rewards(config, World(), named)  # on the CPU: a GPU may be elsewhere
            held_out_metrics(config, World(), held_out)
        notes += [*dataset.remarks, *held_out.remarks]
    except (DataError, RewardError, ModelLoadError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    noun = "preference pairs" if config.training.method == "dpo" else "training prompts"
    for note in notes:
        Console().line(f"note: {note}")
    Console().line(f"{' with '.join(paths)} is fine: {len(dataset)} {noun}, {len(held_out)} held-out prompts")
    return 0
