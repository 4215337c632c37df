"""What every method is given of a half, and what it hands back to a trainer. B samples with latents [C, h, w]."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from glm_training.algorithms.flow_matching import interpolate
from glm_training.models.glm_image.dit_types import Trajectory

Velocity = Callable[..., Tensor]
"""`DiTComponent.forward`, perhaps inside DDP: (latents, timestep, condition, guidance_scale=) -> velocity."""

Context = Callable[[], AbstractContextManager[None]]
"""Makes a context in which a half computes with other weights, without gradient."""


@dataclass
class MethodLoss:
    """One term of an optimizer step.

    loss: scalar with gradient, a mean over the `rows` samples of the term. metrics: detached 0-dim figures, means over
    the same samples unless their name ends in ``_max``. each: detached figures [rows] of the single samples, "loss"
    among them, where the method tells them.
    """

    loss: Tensor
    rows: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    each: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DiTPolicies:
    """The DiT half in its roles. `trained` is `component`, perhaps inside DDP; `old` is a context in which `component`
    is the slow policy that draws (DiffusionNFT), `reference` one in which it is what the KL is measured against."""

    trained: Velocity
    component: Velocity
    reference: Context | None = None
    old: Context = nullcontext


@dataclass(frozen=True)
class MatchingDraws:
    """What a method without trajectories draws: `levels` index the schedule, `noise(level)` gives [B, C, h, w]."""

    levels: tuple[int, ...]
    noise: Callable[[int], Tensor]

    def inputs(self, trajectory: Trajectory, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noisy latents, timesteps [B], noise, sigma) of the final latents at `level`."""
        clean, schedule = trajectory.final, trajectory.schedule
        sigma = schedule.sigmas[level].to(clean.device)
        noise = self.noise(level)
        times = schedule.timesteps[level].to(clean.device).expand(len(clean))
        return interpolate(clean, noise, sigma, check_finite=False), times, noise, sigma
