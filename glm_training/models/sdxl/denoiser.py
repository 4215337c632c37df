"""SDXL's noise levels: a DDPM schedule, and few steps as `LCMScheduler` takes them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from glm_training.models.denoising import Denoiser, Levels, Network, Prediction
from glm_training.models.sdxl.schedule import NoiseSchedule
from glm_training.models.sdxl.types import UNetCondition


class UNetDenoiser(Denoiser):
    """Levels t in [0, T): u in [0, 1] is t = floor(u T), held below T.

    Few-step sampling puts fresh noise on the estimate. `one_step_timestep` is what the network is told when it makes an
    image of pure noise in a single step: 399 for a one-step SDXL (DMD2), None for T - 1.
    """

    renoises = True

    def __init__(self, schedule: NoiseSchedule, one_step_timestep: int | None = None) -> None:
        if one_step_timestep is not None and not 0 <= one_step_timestep < schedule.length:
            raise ValueError(f"one_step_timestep must lie in [0, {schedule.length}), got {one_step_timestep}")
        self.prediction = cast(Prediction, schedule.prediction)
        self.schedule = schedule
        self.one_step_timestep = one_step_timestep

    def levels(self, u: Tensor) -> Levels:
        length = self.schedule.length
        return self.at((u.float() * length).long().clamp(0, length - 1))

    def at(self, timesteps: Tensor) -> Levels:
        """The levels of `timesteps` [B] (long, in [0, T))."""
        signal, spread = self.schedule.coefficients(timesteps)
        return Levels(timesteps, signal, spread)

    def sampling_levels(self, steps: int) -> Levels:
        """t = (steps - k) T // steps - 1 for step k: 999, 749, 499, 249 for four of 1000. ValueError for steps < 1."""
        if not 1 <= steps <= self.schedule.length:
            raise ValueError(f"steps must lie in [1, {self.schedule.length}], got {steps}")
        if steps == 1 and self.one_step_timestep is not None:
            return self.at(torch.tensor([self.one_step_timestep]))
        return self.at(torch.arange(steps, 0, -1) * (self.schedule.length // steps) - 1)

    def predict(
        self, network: Network, noisy: Tensor, levels: Levels, condition: UNetCondition, *, guidance_scale: float = 1.0
    ) -> Tensor:
        return network(
            noisy,
            levels.timestep.to(noisy.device),
            condition.text,
            condition.time_ids,
            guidance_scale=guidance_scale,
            negative=condition.negative,
        )
