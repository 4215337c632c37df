"""The reward section: what is rewarded, and how the halves of the model share in it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import FilePath, Section
from glm_training.config.sections.grpo import GRPOConfig
from glm_training.config.sections.monitors import MonitorsConfig
from glm_training.config.sections.reward_options import METRICS, RewardOptionsConfig

CLASS_PATTERN = r"^([A-Za-z_][\w.]*|.*[^/\\]\.py):[A-Za-z_]\w*$"
"""`module:Class` or `path/to/file.py:Class`."""


class RewardPartConfig(Section):
    """What one half is rewarded for."""

    weights: dict[str, float] | None = Field(
        default=None,
        description="Weights of the metrics for this half alone; null = those of both.",
        json_schema_extra={"allowed": "mapping of metric to number > 0 or null"},
    )


class RewardConfig(Section):
    """What is rewarded."""

    enabled: bool = Field(
        default=True, description="False = no rewards at all: supervised training, and no scores in the evaluation."
    )
    target_images_dir: FilePath | None = Field(
        default=None, description="Images to reach; also `data.target_images_dir` unless that is given."
    )
    metrics: list[str] | dict[str, float] | None = Field(
        default=None,
        description=f"{', '.join(f'`{name}`' for name in METRICS)}, `remote/name`, `module:Class` or "
        "`path/to/file.py:Class`; null = those in `weights`.",
        json_schema_extra={"allowed": "list of metrics, mapping of metric to number > 0 or null"},
    )
    weights: dict[str, float] | None = Field(
        default=None,
        description="Weight of each metric; null = in `metrics`.",
        json_schema_extra={
            "allowed": "mapping of metric to number > 0 or null",
            "default_text": "lpips 0.4, aesthetic 0.3, text_accuracy 0.3 "
            "(i2i: 0.35, 0.25, 0.25, structure 0.15); null if `metrics` is given; of both halves' metrics if only "
            "their weights are",
        },
    )
    calculator: str | None = Field(
        default=None,
        pattern=CLASS_PATTERN,
        description="A RewardCalculator subclass in the metrics' place; null = RewardCalculator itself.",
        json_schema_extra={"allowed": "`module:Class`, `path/to/file.py:Class` or null"},
    )
    ar_reward_weight: float = Field(
        default=1.0, ge=0, le=1_000_000, description="Scale of the AR half's advantages; its KL keeps its own weight."
    )
    dit_reward_weight: float = Field(
        default=1.0, ge=0, le=1_000_000, description="Scale of the DiT half's advantages; its KL keeps its own weight."
    )
    combine: Literal["sum", "gdpo"] = Field(
        default="sum",
        description="Weighted sum of the raw scores; or each metric normalised in its group first (GDPO), so that a "
        "metric with a small spread counts as its weight says.",
    )
    overlap: bool = Field(
        default=True,
        description="Score a chunk of the step while the next one is drawn; the results are the same.",
    )
    on_error: Literal["error", "skip"] = Field(
        default="error", description="A sample that cannot be scored stops the run, or is left out and counted."
    )
    ar: RewardPartConfig = RewardPartConfig()
    dit: RewardPartConfig = RewardPartConfig()
    grpo: GRPOConfig = GRPOConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    options: RewardOptionsConfig = RewardOptionsConfig()

    def metric_names(self) -> set[str]:
        """The metrics that the file names, for both halves or for one."""
        shared = self.metrics if self.metrics is not None else self.weights or ()
        return {*shared, *(self.ar.weights or ()), *(self.dit.weights or ())}

    def metric_weights(self) -> dict[str, float]:
        """Metric to weight, in whichever of the two forms the file gives it. Valid after loading."""
        if isinstance(self.metrics, dict):
            return dict(self.metrics)
        weights = self.weights or {}
        return dict(weights) if self.metrics is None else {name: weights[name] for name in self.metrics}
