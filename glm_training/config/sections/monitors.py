"""The reward.monitors section: what is watched for a reward being hacked, and how far it may move."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import Section


class MonitorsConfig(Section):
    """Signs that a reward is being hacked (docs/monitors.md). A limit of null switches its monitor off."""

    action: Literal["warn", "stop"] = Field(
        default="warn", description="At a limit: say so and go on, or save a checkpoint and stop with exit code 4."
    )
    window: int = Field(
        default=5,
        ge=1,
        le=1_000_000_000,
        description="Training steps whose mean is compared: the first ones with the latest, and these with held-out "
        "scores (gap/... in docs/metrics.md).",
    )
    brightness_change: float | None = Field(
        default=0.4,
        gt=0,
        le=1_000_000,
        description="Largest change of the samples' mean brightness, relative to the nearer of black and white.",
    )
    saturation_change: float | None = Field(
        default=0.6,
        gt=0,
        le=1_000_000,
        description="Largest change of their colour saturation, relative to the nearer of 0 and 1.",
    )
    edges_change: float | None = Field(
        default=0.6,
        gt=0,
        le=1_000_000,
        description="Largest relative change of their edge density: noise raises it, blur lowers it.",
    )
    clipped_rise: float | None = Field(
        default=0.3, gt=0, le=1, description="Largest rise of the share of pixels that are pure white or black."
    )
    diversity_fall: float | None = Field(
        default=0.6, gt=0, le=1, description="Largest relative fall of the distance between the samples of a prompt."
    )
    ar_kl: float | None = Field(
        default=0.5,
        gt=0,
        le=1_000_000,
        description="Largest KL of the AR half to its reference, nats per token; needs its kl_coef.",
    )
    dit_kl: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Largest KL of the DiT half to its reference, in the units of its method; needs its kl_coef.",
    )
    metrics: list[str] = Field(
        default=[],
        description="Metrics that are scored at each evaluation and never trained on.",
        json_schema_extra={"allowed": "list of metrics"},
    )
    metric_fall: float | None = Field(
        default=0.05,
        gt=0,
        le=1_000_000,
        description="Largest fall of one of them from the start while the trained score rises.",
    )
    picture_change: float | None = Field(
        default=0.7,
        gt=0,
        le=2,
        description="Largest distance, 1 - SSIM, of the evaluation's pictures from those of the starting model.",
    )
    source_fall: float | None = Field(
        default=0.3, gt=0, le=2, description="I2i: largest fall of the SSIM between these pictures and their sources."
    )
