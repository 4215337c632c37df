"""DiffusionNFT for the DiT half: no trajectory, no likelihood, only final latents; good ones pull and bad ones push.

Needs of a rollout: final latents of any sampler and the policy that drew them, kept as the slow "old" policy. One term
per noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.flow_matching import interpolate
from glm_training.algorithms.nft import nft_loss
from glm_training.methods.flow_policy_gradient import Velocity
from glm_training.methods.losses import MethodLoss
from glm_training.models.glm_image.dit_types import Trajectory


@dataclass(frozen=True)
class NFT:
    """DiffusionNFT (arXiv:2509.16117) on the noise levels of the sampling schedule."""

    beta: float
    advantage_max: float
    kl_coef: float

    def losses(
        self,
        policy: Velocity,
        trajectory: Trajectory,
        advantages: Tensor,
        *,
        levels: Sequence[int],
        noise: Callable[[int], Tensor],
        old: Callable[[], AbstractContextManager[None]],
        reference: Callable[[], AbstractContextManager[None]] | None = None,
        component: Velocity,
    ) -> Iterator[MethodLoss]:
        """One loss per level, each already divided by their number. `advantages` [B].

        `levels` index the schedule; `noise(level)` gives [B, C, h, w]. `old` and `reference` are contexts in which
        `component` (the same module outside DDP) computes the old policy's and the reference's velocity; the reference
        is needed when `kl_coef` > 0.
        """
        share = 1.0 / len(levels)
        schedule, clean = trajectory.schedule, trajectory.final
        for level in levels:
            sigma = schedule.sigmas[level].to(clean.device)
            times = schedule.timesteps[level].to(clean.device).expand(len(clean))
            noisy = interpolate(clean, noise(level), sigma)
            inputs = (noisy, times, trajectory.condition)
            anchor = None
            with torch.no_grad():
                with old():
                    before = component(*inputs, guidance_scale=trajectory.guidance_scale)
                if self.kl_coef > 0 and reference is not None:
                    with reference():
                        anchor = component(*inputs, guidance_scale=trajectory.guidance_scale)
            result = nft_loss(
                policy(*inputs, guidance_scale=trajectory.guidance_scale),
                before,
                noisy,
                clean,
                sigma,
                advantages,
                beta=self.beta,
                advantage_max=self.advantage_max,
                reference_velocity=anchor,
                kl_coef=self.kl_coef,
                check_finite=False,
            )
            metrics = {"positive_loss": result.positive_loss, "old_deviation": result.old_deviation}
            if result.kl is not None:
                metrics["kl"] = result.kl
            yield MethodLoss(result.loss * share, len(advantages), metrics)
