"""Supervised finetuning on target images: cross-entropy for the AR half, flow matching for the DiT half.

B images: T tokens each, latents [C, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glm_training.algorithms.flow_matching import flow_matching_loss, interpolate
from glm_training.methods.ar_policy_gradient import ScoreTokens
from glm_training.methods.losses import MethodLoss, Velocity
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.dit_types import DiTCondition


@dataclass(frozen=True)
class TokenCrossEntropy:
    """Next-token cross-entropy on the tokens of the target image; preview and large grid are means of their own.

    loss = (w_p * preview + w_l * large) / (w_p + w_l), nats per token; without a preview (i2i) it is the large mean.
    """

    preview_weight: float
    large_weight: float

    def loss(self, policy: ScoreTokens, prompt: ARPrompt, targets: Tensor) -> MethodLoss:
        """`targets` [B, T] from `ARComponent.targets`."""
        losses = -policy(prompt, targets)
        large = losses[:, prompt.preview_length :].mean()
        metrics = {"large_loss": large.detach()}
        total, each = large, losses.detach()[:, prompt.preview_length :].mean(1)
        if prompt.preview_length:
            preview = losses[:, : prompt.preview_length].mean()
            metrics["preview_loss"] = preview.detach()
            weight = self.preview_weight + self.large_weight
            total = (self.preview_weight * preview + self.large_weight * large) / weight
            of_rows = losses.detach()[:, : prompt.preview_length].mean(1)
            each = (self.preview_weight * of_rows + self.large_weight * each) / weight
        return MethodLoss(total, len(targets), metrics, {"loss": each})


@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of the velocity at a drawn noise level, under the real image's own prior tokens.

    A row is trained without any condition where `drop` says so, which is what guidance needs.
    """

    def loss(
        self,
        policy: Velocity,
        component: DiTComponent,
        clean: Tensor,
        condition: DiTCondition,
        *,
        noise: Tensor,
        u: Tensor,
        drop: Tensor,
    ) -> MethodLoss:
        """`clean`, `noise` [B, C, h, w]; `u` [B] in (0, 1) names the noise level before the shift; `drop` [B] bool."""
        timestep, sigma = component.training_sigmas(u, condition.height, condition.width)
        timestep, sigma = timestep.to(clean.device), sigma.to(clean.device)
        if bool(drop.any()):
            condition = component.drop_condition(condition, drop)
        velocity = policy(interpolate(clean, noise, sigma, check_finite=False), timestep, condition)
        loss = flow_matching_loss(velocity, clean, noise, check_finite=False)
        return MethodLoss(loss, len(clean), {"flow_loss": loss.detach()})
