"""DGPO for the DiT half: the renders of a plan as a group, whose good ones are preferred to its bad ones.

Needs of a rollout: final latents of any sampler, all renders of a plan together, and a reference. One term per noise
level. B renders with latents [C, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.awm import velocity_kl
from glm_training.algorithms.dgpo import group_preference_loss
from glm_training.algorithms.flow_matching import flow_matching_loss
from glm_training.methods.losses import DiTPolicies, MatchingDraws, MethodLoss, Velocity
from glm_training.models.glm_image.dit_types import Trajectory


@dataclass(frozen=True)
class DGPO:
    """Direct group preference optimization (arXiv:2510.08425) on the noise levels of the sampling schedule.

    `beta` scales what the sigmoid is taken of. `clip`: a render whose matching error has moved by more than this from
    that of the policy that drew, the way its advantage pushes, has no gradient.
    """

    beta: float
    clip: tuple[float, float]
    kl_coef: float

    @torch.no_grad()
    def densities(self, policy: Velocity, trajectory: Trajectory, draws: MatchingDraws) -> Tensor:
        """Minus the matching errors [B, levels] under `policy`: taken before the first update of a rollout."""
        return -torch.stack([self._error(policy, trajectory, draws, level)[0] for level in draws.levels], dim=1)

    def losses(
        self,
        policies: DiTPolicies,
        trajectory: Trajectory,
        advantages: Tensor,
        groups: Tensor,
        draws: MatchingDraws,
        old_densities: Tensor | None = None,
    ) -> Iterator[MethodLoss]:
        """One loss per level, each already divided by their number. `advantages` [B]; `groups` [B] has one integer for
        all renders of a plan; `policies.reference` is needed.

        `old_densities` [B, levels] are what `densities` gave; None while the weights are those that drew.
        """
        if policies.reference is None:
            raise ValueError("DGPO compares with a reference, and none was kept")
        share = 1.0 / len(draws.levels)
        for column, level in enumerate(draws.levels):
            # before the trained pass, so that none of its activations are held meanwhile
            with torch.no_grad(), policies.reference():
                reference_error, anchor = self._error(policies.component, trajectory, draws, level)
            error, velocity = self._error(policies.trained, trajectory, draws, level)
            result = group_preference_loss(
                error,
                reference_error,
                advantages,
                groups,
                beta=self.beta,
                old_errors=None if old_densities is None else -old_densities[:, column],
                clip=None if old_densities is None else self.clip,
                check_finite=False,
            )
            loss = result.loss
            metrics = {
                "clip_fraction": result.clip_fraction,
                "preference_accuracy": result.accuracy,
                "preference_margin": result.margins.mean(),
                "matching_error": error.detach().mean(),
            }
            if self.kl_coef > 0:
                kl = velocity_kl(velocity, anchor, check_finite=False).mean()
                loss = loss + self.kl_coef * kl
                metrics["kl"] = kl.detach()
            yield MethodLoss(loss * share, len(advantages), metrics)

    def _error(
        self, policy: Velocity, trajectory: Trajectory, draws: MatchingDraws, level: int
    ) -> tuple[Tensor, Tensor]:
        """(matching error [B], velocity [B, C, h, w]) of the drawn images at one level."""
        noisy, times, noise, _ = draws.inputs(trajectory, level)
        velocity = policy(noisy, times, trajectory.condition, guidance_scale=trajectory.guidance_scale)
        error = flow_matching_loss(velocity, trajectory.final, noise, reduction="none", check_finite=False)
        return error, velocity
