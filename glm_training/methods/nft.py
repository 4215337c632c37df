"""DiffusionNFT for the DiT half: no trajectory, no likelihood, only final latents; good ones pull and bad ones push.

Needs of a rollout: final latents of any sampler and the policy that drew them, kept as the slow "old" policy. One term
per noise level. B renders with latents [C, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.nft import nft_loss
from glm_training.methods.losses import DiTPolicies, MatchingDraws, MethodLoss
from glm_training.models.glm_image.dit_types import Trajectory


@dataclass(frozen=True)
class NFT:
    """DiffusionNFT (arXiv:2509.16117) on the noise levels of the sampling schedule."""

    beta: float
    advantage_max: float
    kl_coef: float

    def losses(
        self, policies: DiTPolicies, trajectory: Trajectory, advantages: Tensor, draws: MatchingDraws
    ) -> Iterator[MethodLoss]:
        """One loss per level, each already divided by their number. `advantages` [B]; `policies.old` is the policy that
        drew, `policies.reference` is needed when `kl_coef` > 0."""
        share = 1.0 / len(draws.levels)
        guidance = trajectory.guidance_scale
        for level in draws.levels:
            noisy, times, _, sigma = draws.inputs(trajectory, level)
            inputs = (noisy, times, trajectory.condition)
            anchor = None
            # before the trained pass, so that none of its activations are held meanwhile
            with torch.no_grad():
                with policies.old():
                    before = policies.component(*inputs, guidance_scale=guidance)
                if self.kl_coef > 0 and policies.reference is not None:
                    with policies.reference():
                        anchor = policies.component(*inputs, guidance_scale=guidance)
            result = nft_loss(
                policies.trained(*inputs, guidance_scale=guidance),
                before,
                noisy,
                trajectory.final,
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
