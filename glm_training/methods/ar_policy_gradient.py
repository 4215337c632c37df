"""GRPO for the AR half: the log-probs of the tokens that were drawn, against the advantage of their plan.

Needs of a rollout: tokens with their log-probs. One term per slice. B plans of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.policy_loss import Aggregation, Level, Objective, policy_loss
from glm_training.methods.losses import MethodLoss
from glm_training.models.glm_image.ar_types import ARPrompt, ARRollout

ScoreTokens = Callable[..., Tensor]
"""`ARComponent.forward`, perhaps inside DDP: (prompt, tokens, temperature=, support=, entropy=) -> log-probs [B, T]."""


@dataclass(frozen=True)
class ARPolicyGradient:
    """Clipped policy gradient over tokens (GRPO, arXiv:2402.03300), with what later papers change about it.

    `clip` (low, high): DAPO's asymmetric clip where they differ; under `objective` "cispo" high is the ratio's cap.
    `level` "sequence" is GSPO's ratio. `aggregation` "constant" divides by `constant_length` (Dr.GRPO), the tokens of
    an image of the full size, or by those of each image where that is None.
    `entropy_coef` adds -c * mean entropy to the loss. `preview_weight` and `large_weight` weigh the tokens of the two
    grids against each other. `similarity_weighting`: advantage and KL of each token have weights of their own (STAGE).

    The rows of a slice have the same T tokens and weights, so its mean over its rows is its share of the mean over all
    tokens of the step, and the slices count by `row_weight` where sizes differ.
    """

    clip: tuple[float, float]
    kl_coef: float
    level: Level = "token"
    aggregation: Aggregation = "sequence_mean"
    objective: Objective = "ppo"
    entropy_coef: float = 0.0
    preview_weight: float = 1.0
    large_weight: float = 1.0
    similarity_weighting: bool = False
    constant_length: int | None = None

    terms: int = 1

    def score(self, policy: ScoreTokens, rollout: ARRollout, *, entropy: bool = False) -> Tensor:
        """Log-probs [B, T] of the drawn tokens under `policy`, as the rollout scored them; with `entropy` [2, B, T]."""
        options = {"entropy": True} if entropy else {}
        return policy(
            rollout.prompt, rollout.tokens, temperature=rollout.temperature, support=rollout.support, **options
        )

    def losses(
        self,
        policy: ScoreTokens,
        rollout: ARRollout,
        advantages: Tensor,
        reference_log_probs: Tensor | None = None,
        *,
        on_policy: bool = False,
        token_weights: Tensor | None = None,
    ) -> Iterator[MethodLoss]:
        """The loss of a slice: `advantages` [B]; `reference_log_probs` [B, T], needed when `kl_coef` > 0;
        `token_weights` [B, 2, T], of the tokens' advantages and of their KL, needed with `similarity_weighting`.

        `on_policy`: the weights are those that drew, so every ratio is 1, however differently the drawing rounded; by
        how much it did is then the figure `replay_gap` (nats per token).
        """
        scored = self.score(policy, rollout, entropy=self.entropy_coef > 0)
        log_probs = scored[0] if self.entropy_coef > 0 else scored
        weights = self._weights(rollout, log_probs)
        kl_weights = None
        if self.similarity_weighting:
            if token_weights is None:
                raise ValueError("token_weights are needed for similarity_weighting")
            advantages, kl_weights = advantages[:, None] * token_weights[:, 0], token_weights[:, 1]
        result = policy_loss(
            log_probs,
            log_probs.detach() if on_policy else rollout.log_probs,
            advantages,
            clip=self.clip,
            level=self.level,
            objective=self.objective,
            aggregation=self.aggregation,
            constant_length=(self.constant_length or rollout.prompt.T) if self.aggregation == "constant" else None,
            reference_log_probs=reference_log_probs if self.kl_coef > 0 else None,
            kl_coef=self.kl_coef,
            kl_weights=kl_weights,
            weights=weights,
            check_finite=False,
        )
        loss = result.loss
        metrics = {
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "ratio_deviation_max": result.ratio_max_deviation,
        }
        if on_policy:
            gap = (log_probs.detach() - rollout.log_probs).abs()
            metrics |= {"replay_gap": gap.mean(), "replay_gap_max": gap.max()}
        if self.entropy_coef > 0:
            entropy = scored[1].mean()
            loss = loss - self.entropy_coef * entropy
            metrics["entropy"] = entropy.detach()
        if result.reference_kl is not None:
            metrics["kl"] = result.reference_kl.detach()
        yield MethodLoss(loss, len(rollout), metrics)

    def row_weight(self, prompt: ARPrompt) -> float:
        """What a row of these sizes counts in the loss of a step against one of others: under "token_mean" the sum of
        its tokens' weights, else 1."""
        if self.aggregation != "token_mean":
            return 1.0
        if self._alike(prompt):
            return prompt.T
        preview = prompt.preview_length
        return preview * self.preview_weight + (prompt.T - preview) * self.large_weight

    def _alike(self, prompt: ARPrompt) -> bool:
        return not prompt.preview_length or self.preview_weight == self.large_weight

    def _weights(self, rollout: ARRollout, like: Tensor) -> Tensor | None:
        """[B, T], preview tokens first, or None where all count alike."""
        preview = rollout.prompt.preview_length
        if self._alike(rollout.prompt):
            return None
        weights = torch.full_like(like, self.large_weight)
        weights[:, :preview] = self.preview_weight
        return weights

    @torch.no_grad()
    def deviation(self, policy: ScoreTokens, rollout: ARRollout) -> Tensor:
        """|replayed - drawn log-prob| [B, T]: zero up to rounding while the weights are those that drew."""
        return (self.score(policy, rollout) - rollout.log_probs).abs()
