"""What pictures in their own shapes ask of the other keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue
from glm_training.config.sections.data import BUCKET_MULTIPLES

if TYPE_CHECKING:
    from glm_training.config.schema import Config


def bucket_issues(config: Config) -> Iterator[Issue]:
    """Everything about `data.buckets` that cannot be, or would do nothing."""
    buckets, size = config.data.buckets, config.data.image_size
    if not buckets.enabled:
        for name, plain in (("upscale", False), ("smallest", 64)):
            if getattr(buckets, name) != plain:
                yield Issue(
                    (f"data.buckets.{name}", "data.buckets.enabled"),
                    "without buckets it does nothing.",
                    "Set `data.buckets.enabled: true`.",
                )
        return
    multiple = BUCKET_MULTIPLES.get(config.model.family)
    if multiple is None:
        yield Issue(
            ("data.buckets.enabled", "model.family"),
            f"`{config.model.family}` is trained at one size.",
            "Set it to false.",
        )
        return
    if config.training.method == "dmdr":
        yield Issue(("data.buckets.enabled", "training.method"), "`dmdr` draws at one size.", "Set it to false.")
    if buckets.smallest % multiple:
        yield Issue(
            ("data.buckets.smallest", "model.family"),
            f"{buckets.smallest} is no multiple of {multiple}, of which `{config.model.family}`'s sizes are.",
            f"Set it to {buckets.smallest + multiple // 2}.",
        )
    if buckets.smallest**2 > size.height * size.width:
        yield Issue(
            ("data.buckets.smallest", "data.image_size"),
            f"a bucket of {buckets.smallest} x {buckets.smallest} is over the area of {size.height} x {size.width}.",
            "Lower it, or raise `data.image_size`.",
        )
    if config.uses_reward() and config.reward.grpo.max_resamples > 0:
        yield Issue(
            ("reward.grpo.max_resamples", "data.buckets.enabled"),
            "prompts cannot be replaced one by one in batches of one size.",
            "Set it to 0, or `data.buckets.enabled: false`.",
        )
