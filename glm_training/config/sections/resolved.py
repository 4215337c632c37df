"""What a configuration comes to once every `null` has found the value it inherits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm_training.config.sections.optimization import MomentsDtype, OptimizerName, SchedulerName


@dataclass(frozen=True)
class ResolvedOptimizer:
    """Optimizer and schedule of one half. `max_grad_norm` 0 = no limit; `beta1` is the momentum of sgd. `cycles` are of
    `cosine_with_restarts`, `power` of `polynomial`, `moments_dtype` of `adamw`."""

    name: OptimizerName
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    scheduler: SchedulerName
    warmup_steps: int
    min_lr_ratio: float
    decay_norms_and_biases: bool = False
    cycles: int = 2
    power: float = 1.0
    moments_dtype: MomentsDtype = "float32"


@dataclass(frozen=True)
class ResolvedPolicy:
    """Policy update of one half: the ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    reward_weight: float
    kl_coef: float
    clip_low: float
    clip_high: float
    updates_per_rollout: int
    advantage_scale: Literal["group", "batch", "none"]
    skip_flat_groups: bool = False


@dataclass(frozen=True)
class ResolvedLora:
    """Adapters of one half; the other fields mean something only if `enabled`."""

    enabled: bool
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ResolvedSampling:
    """How images are drawn, in training rollouts or in evaluation."""

    temperature: float
    top_p: float
    do_sample: bool
    num_inference_steps: int
    guidance_scale: float
    parallel: int = 1


@dataclass(frozen=True)
class RolloutGroup:
    """The images of one prompt: `plans` AR samples, each rendered `renders` times."""

    plans: int
    renders: int

    @property
    def size(self) -> int:
        """Images per prompt."""
        return self.plans * self.renders


def split_group(component: str, num_samples: int, plans: int | None, renders: int | None) -> RolloutGroup | None:
    """`num_samples` as plans x renders, keeping the factors that are given; None where that does not come out."""
    if plans is None:
        renders = renders or {"ar": 1, "dit": num_samples, "both": 2}[component]
        plans = num_samples // renders
    elif renders is None:
        renders = num_samples // plans
    group = RolloutGroup(plans, renders)
    return group if group.size == num_samples else None
