"""Whether a checkpoint belongs to this run: the configuration and the data it was made under."""

from __future__ import annotations

from typing import Any

from glm_training.checkpoint.resume import ResumePoint
from glm_training.config import Config, config_diff, resolved_yaml
from glm_training.config.loading.load import config_from_yaml
from glm_training.data import describe_drift
from glm_training.engine.errors import TrainingError

LENGTH = ["training.max_steps", "training.num_epochs"]
"""A run may be made longer when it is resumed; a schedule that ends with the run then ends later."""


def save_context(config: Config, digests: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint remembers of the run, for `check_drift`."""
    return {"config": resolved_yaml(config), "data": digests}


def check_drift(point: ResumePoint, config: Config, digests: dict[str, str]) -> None:
    """Raises TrainingError with a diff when configuration or data changed; `resume.accept` lists what may."""
    context = point.manifest.metadata
    accepted = [*LENGTH, *config.resume.accept]
    lines = config_diff(config_from_yaml(context["config"]), config, accepted)
    if "data" not in config.resume.accept:
        lines += describe_drift(context["data"], digests)
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise TrainingError(
            f"{point.path} was made under other settings or data:\n{listed}\n"
            "put them back, or list the keys under resume.accept (data: the images or prompts)"
        )
