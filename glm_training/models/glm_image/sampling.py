"""The denoising loop: ODE steps, and SDE steps where they are asked for, through the same velocity that is trained.

Letters in shapes: `dit_types`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm_training.algorithms.flow_sde import Kernel, sde_step
from glm_training.models.glm_image.dit_types import DiTCondition, FlowSchedule, Trajectory

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, C, h, w] fp32, timestep of the schedule, 0-dim CPU) -> velocity [B, C, h, w] fp32."""

StepHook = Callable[[int], None]
"""Called with the index of a step before it is computed; may raise to abandon the sampling."""

TOKENS_PER_HOOK = 16
"""A hook that all processes must agree in costs about as much as a token of a small model: not at every one."""


def step_hooks(
    on_step: Callable[[], None] | None,
) -> tuple[Callable[[int], None] | None, Callable[[int], None] | None]:
    """`on_step` as the hook of a rollout (every `TOKENS_PER_HOOK` tokens) and of a sampling run (every step)."""
    if on_step is None:
        return None, None

    def at_token(token: int) -> None:
        if token % TOKENS_PER_HOOK == 1:
            on_step()

    return at_token, lambda step: on_step()


@dataclass(frozen=True)
class SamplerSettings:
    """How a trajectory is drawn. `sde_indices` are the steps that draw noise under `kernel` with strength `eta`."""

    schedule: FlowSchedule
    guidance_scale: float = 1.0
    kernel: Kernel = "ode"
    eta: float = 0.7
    sde_indices: tuple[int, ...] = ()
    store: bool = False
    keep_means: bool = False

    def check(self, noise: Tensor, step_noise: Tensor | None) -> None:
        """Raise ValueError when indices, kernel and noises do not belong together."""
        indices = self.sde_indices
        if list(indices) != sorted(set(indices)) or any(not 0 <= k < self.schedule.steps for k in indices):
            raise ValueError(
                f"sde_indices must be ascending, without repeats and in [0, {self.schedule.steps}), got {indices}"
            )
        if indices and self.kernel == "ode":
            raise ValueError(f'sde_indices {indices} need a stochastic kernel (flow, dance or cps); kernel is "ode"')
        wanted = (len(indices), *noise.shape)
        if indices and (step_noise is None or tuple(step_noise.shape) != wanted):
            got = None if step_noise is None else list(step_noise.shape)
            raise ValueError(f"step_noise must be [len(sde_indices), *noise.shape] = {list(wanted)}, got {got}")
        if not indices and step_noise is not None and step_noise.shape[0] != 0:
            raise ValueError("step_noise was given, but sde_indices names no step to use it at")


def sample_rows(
    velocity: Velocity,
    noise: Tensor,
    condition: DiTCondition,
    settings: SamplerSettings,
    step_noise: Tensor | None,
    on_step: StepHook | None = None,
    first_step: int = 0,
) -> Trajectory:
    """Run the schedule from `first_step` on, from latents `noise` ``[B, C, h, w]``; the caller holds `torch.no_grad`.

    `on_step` is called with the index of each step before it is computed; it may raise to abandon the sampling.
    Raises FloatingPointError when the result is not finite.
    """
    schedule = settings.schedule
    wanted = {k + offset for k in settings.sde_indices for offset in (0, 1)} if settings.store else set()
    kept: dict[int, Tensor] = {}
    log_probs, means = list[Tensor](), list[Tensor]()
    latents = noise.float()  # fp32 throughout: a latent that is rounded is another one than was drawn
    for step in range(first_step, schedule.steps):
        if on_step is not None:
            on_step(step)
        if step in wanted:
            kept[step] = latents
        stochastic = step in settings.sde_indices
        drawn = step_noise[len(log_probs)].to(latents.device) if stochastic and step_noise is not None else None
        taken = sde_step(
            latents,
            velocity(latents, schedule.timesteps[step]),
            schedule.sigmas[step],
            schedule.sigmas[step + 1],
            kernel=settings.kernel if stochastic else "ode",
            eta=settings.eta,
            sigma_max=schedule.sigma_max,
            noise=drawn,
            check_finite=False,  # once, at the end
        )
        latents = taken.next_latents
        if taken.log_prob is not None:
            log_probs.append(taken.log_prob)
            means += [taken.mean] if settings.keep_means else []
    if schedule.steps in wanted:
        kept[schedule.steps] = latents
    if not bool(torch.isfinite(latents).all()):
        raise FloatingPointError(
            "sampling ended in NaN or infinite latents: the DiT's weights or its inputs are not finite"
        )
    return Trajectory(
        final=latents,
        sde_indices=settings.sde_indices,
        log_probs=torch.stack(log_probs, dim=1) if log_probs else latents.new_zeros(len(latents), 0),
        condition=condition,
        schedule=schedule,
        guidance_scale=settings.guidance_scale,
        kernel=settings.kernel,
        eta=settings.eta,
        stored=torch.stack(list(kept.values()), dim=1) if kept else None,
        stored_steps=tuple(kept),
        means=torch.stack(means, dim=1) if means else None,
    )


def run_prefix(
    velocity: Velocity, noise: Tensor, schedule: FlowSchedule, stop: int, on_step: StepHook | None
) -> Tensor:
    """Latents before step `stop` of rows that follow the ODE until there."""
    latents = noise.float()
    for step in range(stop):
        if on_step is not None:
            on_step(step)
        sigmas = schedule.sigmas[step], schedule.sigmas[step + 1]
        latents = sde_step(latents, velocity(latents, schedule.timesteps[step]), *sigmas, check_finite=False).mean
    return latents


def join_rows(parts: list[Trajectory], condition: DiTCondition) -> Trajectory:
    """Micro-batches of one sampling run as one trajectory under the whole `condition`."""
    stored = [part.stored for part in parts if part.stored is not None]
    means = [part.means for part in parts if part.means is not None]
    return replace(
        parts[0],
        final=torch.cat([part.final for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        condition=condition,
        stored=torch.cat(stored) if stored else None,
        means=torch.cat(means) if means else None,
    )
