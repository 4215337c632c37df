"""What `model.quantization` asks of the rest of a configuration: base weights in few bits that nothing writes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue

if TYPE_CHECKING:
    from glm_training.config.schema import Config

KEY = "model.quantization"

UNSUITED = {
    "dmdr": "distillation keeps a copy of the starting model as its teacher, which would have few bits too",
    "opd": "teachers lay their weights over the student's, which have another form",
}
"""Values of `training.method` that need base weights in full, and why."""


def quantization_issues(config: Config) -> Iterator[Issue]:
    """Everything that cannot go with base weights in few bits. What shards weights over processes belongs here too."""
    if config.model.quantization == "none":
        return
    if config.model.family == "vgt":
        yield Issue((KEY, "model.family"), "VGT's models are trained whole, without adapters.", "Remove it.")
        return
    for part in config.parts():
        if not config.lora_for(part).enabled:
            key = "lora.enabled" if getattr(config.lora, part).enabled is None else f"lora.{part}.enabled"
            yield Issue(
                (KEY, key),
                f"weights in few bits cannot be trained, and `{part}` is trained whole.",
                f"Set `{key}: true`, or remove it.",
            )
    if not config.checkpoint.save_lora_only:
        yield Issue(
            ("checkpoint.save_lora_only", KEY),
            "a pipeline needs the base weights in full, and this run has them in few bits.",
            "Set it to true: the adapters that are saved go with `model.name` as it is, `glm-train sample --lora`.",
        )
    if config.training.method in UNSUITED:
        yield Issue(("training.method", KEY), f"{UNSUITED[config.training.method]}.", f"Remove `{KEY}`.")
