"""GRPO for the AR half: the log-probs of the tokens that were drawn, against the advantage of their plan.

Needs of a rollout: tokens with their log-probs. One term per slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.policy_loss import Aggregation, Level, policy_loss
from glm_training.methods.losses import MethodLoss
from glm_training.models.glm_image.ar_types import ARRollout

ScoreTokens = Callable[..., Tensor]
"""`ARComponent.forward`, perhaps inside DDP: (prompt, tokens, temperature=, support=) -> log-probs [B, T]."""


@dataclass(frozen=True)
class ARPolicyGradient:
    """Clipped policy gradient over tokens (GRPO, arXiv:2402.03300); `level` "sequence" is GSPO's ratio.

    Raster tokens all count: every row has the same length T, so the mean over tokens and the mean over sequences
    agree; `aggregation` still decides how the loss is written down.
    """

    clip: tuple[float, float]
    kl_coef: float
    level: Level = "token"
    aggregation: Aggregation = "sequence_mean"

    terms: int = 1

    def score(self, policy: ScoreTokens, rollout: ARRollout) -> Tensor:
        """Log-probs [B, T] of the drawn tokens under `policy`, as the rollout scored them."""
        return policy(rollout.prompt, rollout.tokens, temperature=rollout.temperature, support=rollout.support)

    def losses(
        self, policy: ScoreTokens, rollout: ARRollout, advantages: Tensor, reference_log_probs: Tensor | None = None
    ) -> Iterator[MethodLoss]:
        """The loss of a slice: `advantages` [B]; `reference_log_probs` [B, T], needed when `kl_coef` > 0."""
        result = policy_loss(
            self.score(policy, rollout),
            rollout.log_probs,
            advantages,
            clip=self.clip,
            level=self.level,
            aggregation=self.aggregation,
            reference_log_probs=reference_log_probs if self.kl_coef > 0 else None,
            kl_coef=self.kl_coef,
            check_finite=False,
        )
        metrics = {
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "ratio_deviation_max": result.ratio_max_deviation,
        }
        if result.reference_kl is not None:
            metrics["kl"] = result.reference_kl.detach()
        yield MethodLoss(result.loss, len(rollout), metrics)

    @torch.no_grad()
    def deviation(self, policy: ScoreTokens, rollout: ARRollout) -> Tensor:
        """|replayed - drawn log-prob| [B, T]: zero up to rounding while the weights are those that drew."""
        return (self.score(policy, rollout) - rollout.log_probs).abs()
