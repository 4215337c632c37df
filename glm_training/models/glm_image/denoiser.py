"""GLM-Image's noise levels: flow matching, the network told the unshifted time of a shifted level."""

from __future__ import annotations

from torch import Tensor

from glm_training.models.denoising import Denoiser, Levels, Network
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.dit_types import DiTCondition


class DiTDenoiser(Denoiser):
    """Levels of images of `height` x `width` px: sigma = shift(u) is the spread, 1 - sigma the signal.

    Few-step sampling is the stock pipeline's Euler steps.
    """

    prediction = "velocity"
    renoises = False

    def __init__(self, component: DiTComponent, height: int, width: int) -> None:
        self._component = component
        self._size = height, width

    def levels(self, u: Tensor) -> Levels:
        timestep, sigma = self._component.training_sigmas(u, *self._size)
        return Levels(timestep, 1 - sigma, sigma)

    def sampling_levels(self, steps: int) -> Levels:
        schedule = self._component.schedule(steps, *self._size)
        sigma = schedule.sigmas[:-1]
        return Levels(schedule.timesteps, 1 - sigma, sigma)

    def predict(
        self, network: Network, noisy: Tensor, levels: Levels, condition: DiTCondition, *, guidance_scale: float = 1.0
    ) -> Tensor:
        return network(noisy, levels.timestep.to(noisy.device), condition, guidance_scale=guidance_scale)
