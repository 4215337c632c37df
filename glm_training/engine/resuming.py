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
    """Raises TrainingError with a diff when configuration or data changed; `resume.accept` lists what may.

    Another class of optimizer is refused whatever is accepted: what one remembers means nothing to the other.
    """
    context = point.manifest.metadata
    accepted = [*LENGTH, *config.resume.accept]
    before = config_from_yaml(context["config"])
    _require_same_optimizers(point, before, config)
    lines = config_diff(before, config, accepted)
    if "data" not in config.resume.accept:
        lines += describe_drift(context["data"], digests)
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise TrainingError(
            f"{point.path} was made under other settings or data:\n{listed}\n"
            "put them back, or list the keys under resume.accept (data: the images or prompts)"
        )


def _require_same_optimizers(point: ResumePoint, before: Config, now: Config) -> None:
    changed = []
    for part in now.parts():
        saved, wanted = before.optimizer_for(part).name, now.optimizer_for(part).name
        if saved != wanted:
            changed.append(f"  the {part} half was trained with {saved}, and this run asks for {wanted}")
    if changed:
        listed = "\n".join(changed)
        raise TrainingError(
            f"{point.path} cannot be continued with another optimizer:\n{listed}\n"
            "put training.optimizer (or optimizer.<half>.name) back; resume.accept cannot allow it, as what one "
            "remembers means nothing to the other. To go on with new moments, start a run with model.name set to the "
            "checkpoint's pipeline folder"
        )
