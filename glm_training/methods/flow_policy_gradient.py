"""Flow-GRPO for the DiT half: the noisy denoising steps are the actions, each a Gaussian with a known log-prob.

Needs of a rollout: a trajectory with the latents around its SDE steps. One term per SDE step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.flow_sde import SDEStep, gaussian_kl
from glm_training.algorithms.policy_loss import policy_loss
from glm_training.methods.losses import MethodLoss
from glm_training.models.glm_image.dit_types import Trajectory

Velocity = Callable[..., Tensor]
"""`DiTComponent.forward`, perhaps inside DDP: (latents, timestep, condition, guidance_scale=) -> velocity."""


@dataclass(frozen=True)
class FlowPolicyGradient:
    """Clipped policy gradient over denoising steps (Flow-GRPO, arXiv:2505.05470).

    The log-prob is a mean over latent dims, so ratios stay near 1 and the clip range is of the order of 1e-4. The KL to
    the reference is the closed form between the two Gaussians of a step.
    """

    clip: tuple[float, float]
    kl_coef: float

    def replay(self, policy: Velocity, trajectory: Trajectory, step: int) -> SDEStep:
        """Step `step` again under `policy`, with the guidance, kernel and eta that sampled."""
        times = trajectory.schedule.timesteps[step].to(trajectory.final.device).expand(len(trajectory.final))
        velocity = policy(trajectory.at(step), times, trajectory.condition, guidance_scale=trajectory.guidance_scale)
        return trajectory.score(step, velocity)

    def losses(
        self,
        policy: Velocity,
        trajectory: Trajectory,
        advantages: Tensor,
        *,
        reference: Callable[[], AbstractContextManager[None]] | None = None,
        component: Velocity,
    ) -> Iterator[MethodLoss]:
        """One loss per SDE step, each already divided by their number. `advantages` [B].

        `reference` is a context in which `component` (the same module outside DDP) computes the reference's velocity;
        needed when `kl_coef` > 0.
        """
        share = 1.0 / len(trajectory.sde_indices)
        for column, step in enumerate(trajectory.sde_indices):
            anchor = None
            if self.kl_coef > 0 and reference is not None:
                with reference():
                    anchor = self.replay(component, trajectory, step).mean
            now = self.replay(policy, trajectory, step)
            assert now.log_prob is not None  # the ODE kernel has no SDE steps
            result = policy_loss(
                now.log_prob[:, None],
                trajectory.log_probs[:, column, None],
                advantages,
                clip=self.clip,
                check_finite=False,
            )
            loss = result.loss
            metrics = {
                "clip_fraction": result.clip_fraction,
                "approx_kl": result.approx_kl,
                "ratio_deviation_max": result.ratio_max_deviation,
            }
            if anchor is not None:
                kl = gaussian_kl(now.mean, anchor, now.std).mean()
                loss = loss + self.kl_coef * kl
                metrics["kl"] = kl.detach()
            yield MethodLoss(loss * share, len(advantages), metrics)

    @torch.no_grad()
    def deviation(self, policy: Velocity, trajectory: Trajectory, step: int) -> Tensor:
        """|ratio - 1| [B] of SDE step `step`: zero up to rounding while the weights are those that sampled."""
        log_prob = self.replay(policy, trajectory, step).log_prob
        assert log_prob is not None
        return torch.expm1(log_prob - trajectory.log_probs[:, trajectory.sde_indices.index(step)]).abs()
