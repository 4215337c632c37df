"""Flow-GRPO for the DiT half: the noisy denoising steps are the actions, each a Gaussian with a known log-prob.

Needs of a rollout: a trajectory with the latents around its SDE steps. One term per SDE step. Which steps those are,
and by which kernel they draw, is the rollout's: MixGRPO, Flow-GRPO-Fast, Dance and CPS differ there alone.

B renders with latents [C, h, w] and K SDE steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from glm_training.algorithms.awm import velocity_kl
from glm_training.algorithms.flow_sde import SDEStep, divergence_mask, gaussian_kl, guard_log_ratio, noise_weights
from glm_training.algorithms.policy_loss import PolicyLoss, policy_loss
from glm_training.methods.losses import DiTPolicies, MethodLoss, Velocity
from glm_training.models.glm_image.dit_types import Trajectory

NO_CLIP = (1.0, 1e9)
"""Bounds that no ratio reaches."""


@dataclass(frozen=True)
class FlowPolicyGradient:
    """Clipped policy gradient over denoising steps (Flow-GRPO, arXiv:2505.05470).

    The log-prob is a mean over latent dims, so ratios stay near 1 and the clip range is of the order of 1e-4. The KL to
    the reference is the closed form between the two Gaussians of a step, 1/|dt| times what the published code has.

    `guard`: log-ratios centred and of one size at every step, the loss of a step divided by |dt| (GRPO-Guard,
    arXiv:2510.22319). `divergence_threshold`: no ratio clip; a sample whose step has moved further than this KL (per
    latent dim) from the policy that drew it is not pushed further out (Flow-DPPO). `noise_weighting`: the policy loss
    of a step, not its KL, times the step's `noise_weights` (TempFlow-GRPO, arXiv:2508.04324). `kl_form` "velocity":
    the squared velocity difference at the drawn latents in the place of the step's KL (UniGRPO, arXiv:2603.23500).
    """

    clip: tuple[float, float]
    kl_coef: float
    guard: bool = False
    divergence_threshold: float | None = None
    noise_weighting: bool = False
    kl_form: Literal["step", "velocity"] = "step"

    def replay(self, policy: Velocity, trajectory: Trajectory, step: int) -> SDEStep:
        """Step `step` again under `policy`, with the guidance, kernel and eta that sampled."""
        return trajectory.score(step, self._velocity(policy, trajectory, step))

    def _velocity(self, policy: Velocity, trajectory: Trajectory, step: int) -> Tensor:
        """[B, C, h, w] under `policy` at the drawn latents before `step`."""
        times = trajectory.schedule.timesteps[step].to(trajectory.final.device).expand(len(trajectory.final))
        return policy(trajectory.at(step), times, trajectory.condition, guidance_scale=trajectory.guidance_scale)

    @torch.no_grad()
    def rescored(self, policy: Velocity, trajectory: Trajectory) -> tuple[Tensor, Tensor | None]:
        """Log-probs [B, K] of the SDE steps and, where they are kept, their means [B, K, C, h, w], as a replay under
        the weights that drew has them."""
        steps = [self.replay(policy, trajectory, step) for step in trajectory.sde_indices]
        log_probs = torch.stack([step.log_prob for step in steps if step.log_prob is not None], dim=1)
        means = None if trajectory.means is None else torch.stack([step.mean for step in steps], dim=1)
        return log_probs, means

    def losses(
        self, policies: DiTPolicies, trajectory: Trajectory, advantages: Tensor, *, on_policy: bool = False
    ) -> Iterator[MethodLoss]:
        """One loss per SDE step, each already divided by their number. `advantages` [B]; `policies.reference` is needed
        when `kl_coef` > 0.

        `on_policy`: the weights are those that drew, so every ratio is 1, however differently the drawing rounded; by
        how much it did is then the figure `replay_gap` (nats per latent dim).
        """
        share = 1.0 / len(trajectory.sde_indices)
        weights = self._step_weights(trajectory)
        for step in trajectory.sde_indices:
            anchor = None
            # before the trained pass, so that none of its activations are held meanwhile
            if self.kl_coef > 0 and policies.reference is not None:
                with policies.reference():
                    anchor = self._velocity(policies.component, trajectory, step)
            velocity = self._velocity(policies.trained, trajectory, step)
            now = trajectory.score(step, velocity)
            assert now.log_prob is not None  # the ODE kernel has no SDE steps
            drawn = trajectory.log_probs[:, trajectory.sde_indices.index(step)]
            old = now.log_prob.detach() if on_policy else drawn
            old_mean = None
            if self.guard or self.divergence_threshold is not None:
                old_mean = now.mean.detach() if on_policy else trajectory.mean_at(step)
            result, divergence = self._step_loss(now, old, old_mean, trajectory, step, advantages)
            loss = result.loss * weights[step]
            metrics = {
                "clip_fraction": result.clip_fraction,
                "approx_kl": result.approx_kl if divergence is None else divergence,
                "ratio_deviation_max": result.ratio_max_deviation,
            }
            if on_policy:
                gap = (old - drawn).abs()
                metrics |= {"replay_gap": gap.mean(), "replay_gap_max": gap.max()}
            if anchor is not None:
                kl = self._kl(trajectory, step, velocity, now, anchor)
                loss = loss + self.kl_coef * kl
                metrics["kl"] = kl.detach()
            yield MethodLoss(loss * share, len(advantages), metrics)

    def _step_weights(self, trajectory: Trajectory) -> list[float]:
        """Of each denoising step, in its policy loss."""
        schedule = trajectory.schedule
        if not self.noise_weighting:
            return [1.0] * schedule.steps
        return noise_weights(schedule.sigmas, kernel=trajectory.kernel, eta=trajectory.eta).tolist()

    def _kl(self, trajectory: Trajectory, step: int, velocity: Tensor, now: SDEStep, anchor: Tensor) -> Tensor:
        """The mean distance of a step from the reference, whose velocity is `anchor` [B, C, h, w]."""
        if self.kl_form == "velocity":
            return velocity_kl(velocity, anchor, check_finite=False).mean()
        return gaussian_kl(now.mean, trajectory.score(step, anchor).mean, now.std, check_finite=False).mean()

    def _step_loss(
        self, now: SDEStep, old: Tensor, old_mean: Tensor | None, trajectory: Trajectory, step: int, advantages: Tensor
    ) -> tuple[PolicyLoss, Tensor | None]:
        """The policy loss of one step, and the mean KL to the policy that drew where that was computed.

        `old` [B], `old_mean` [B, C, h, w]: log-probs and means of the policy that drew.
        """
        assert now.log_prob is not None
        log_ratio, mask, clip, divergence, scale = now.log_prob - old, None, self.clip, None, 1.0
        if self.guard:
            assert old_mean is not None
            log_ratio = guard_log_ratio(now.log_prob, old, now.mean, old_mean, now.std, check_finite=False)
            sigmas = trajectory.schedule.sigmas
            scale = 1.0 / float(sigmas[step] - sigmas[step + 1])
        if self.divergence_threshold is not None:
            assert old_mean is not None
            moved = gaussian_kl(now.mean, old_mean, now.std, check_finite=False).detach()
            kept = divergence_mask(log_ratio.exp(), advantages, moved, self.divergence_threshold)
            mask, clip, divergence = kept[:, None], NO_CLIP, moved.mean()
        result = policy_loss(
            log_ratio[:, None], torch.zeros_like(log_ratio)[:, None], advantages, mask, clip=clip, check_finite=False
        )
        if mask is not None:
            result = replace(result, clip_fraction=1 - mask.float().mean())
        return (result if scale == 1.0 else replace(result, loss=result.loss * scale)), divergence

    @torch.no_grad()
    def deviation(self, policy: Velocity, trajectory: Trajectory, step: int) -> Tensor:
        """|ratio - 1| [B] of SDE step `step`: zero up to rounding while the weights are those that sampled."""
        log_prob = self.replay(policy, trajectory, step).log_prob
        assert log_prob is not None
        return torch.expm1(log_prob - trajectory.log_probs[:, trajectory.sde_indices.index(step)]).abs()
