"""Advantage-weighted matching for the DiT half: the flow-matching error of the drawn images in the likelihood's place.

Needs of a rollout: final latents of any sampler. One term per noise level. B renders with latents [C, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.awm import matching_log_density, velocity_kl
from glm_training.algorithms.policy_loss import policy_loss
from glm_training.methods.losses import DiTPolicies, MatchingDraws, MethodLoss, Velocity
from glm_training.models.glm_image.dit_types import Trajectory


@dataclass(frozen=True)
class AWM:
    """AWM (arXiv:2509.25050) on the noise levels of the sampling schedule, with a clipped ratio.

    The ratio is taken against the policy that drew, at the same noise and level. `huber`: see `matching_log_density`.
    """

    clip: tuple[float, float]
    kl_coef: float
    huber: float | None = None

    @torch.no_grad()
    def densities(self, policy: Velocity, trajectory: Trajectory, draws: MatchingDraws) -> Tensor:
        """Log-density surrogates [B, levels] under `policy`: taken before the first update of a rollout."""
        return torch.stack([self._density(policy, trajectory, draws, level)[0] for level in draws.levels], dim=1)

    def losses(
        self,
        policies: DiTPolicies,
        trajectory: Trajectory,
        advantages: Tensor,
        draws: MatchingDraws,
        old_densities: Tensor | None = None,
    ) -> Iterator[MethodLoss]:
        """One loss per level, each already divided by their number. `advantages` [B]; `policies.reference` is needed
        when `kl_coef` > 0.

        `old_densities` [B, levels] are what `densities` gave; None while the weights are those that drew.
        """
        share = 1.0 / len(draws.levels)
        for column, level in enumerate(draws.levels):
            anchor = None
            # before the trained pass, so that none of its activations are held meanwhile
            if self.kl_coef > 0 and policies.reference is not None:
                with torch.no_grad(), policies.reference():
                    anchor = self._density(policies.component, trajectory, draws, level)[1]
            density, velocity = self._density(policies.trained, trajectory, draws, level)
            old = density.detach() if old_densities is None else old_densities[:, column]
            result = policy_loss(density[:, None], old[:, None], advantages, clip=self.clip, check_finite=False)
            loss = result.loss
            metrics = {
                "clip_fraction": result.clip_fraction,
                "ratio_deviation_max": result.ratio_max_deviation,
                "matching_error": -density.detach().mean(),
            }
            if anchor is not None:
                kl = velocity_kl(velocity, anchor, check_finite=False).mean()
                loss = loss + self.kl_coef * kl
                metrics["kl"] = kl.detach()
            yield MethodLoss(loss * share, len(advantages), metrics)

    def _density(
        self, policy: Velocity, trajectory: Trajectory, draws: MatchingDraws, level: int
    ) -> tuple[Tensor, Tensor]:
        """(log-density surrogate [B], velocity [B, C, h, w]) of the drawn images at one level."""
        noisy, times, noise, _ = draws.inputs(trajectory, level)
        velocity = policy(noisy, times, trajectory.condition, guidance_scale=trajectory.guidance_scale)
        return matching_log_density(velocity, trajectory.final, noise, huber=self.huber, check_finite=False), velocity
