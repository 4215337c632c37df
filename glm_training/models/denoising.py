"""A diffusion model as training sees it: noise levels, what its network predicts, what a prediction says of the image.

x = a x0 + b e with a the signal and b the spread of a noise level, e standard normal noise. The network predicts e
("epsilon"), a e - b x0 ("v_prediction", arXiv:2202.00512) or e - x0 ("velocity", flow matching with a = 1 - b).
B rows with latents [C, h, w].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "velocity"]

Network = Callable[..., Tensor]
"""The `forward` of a component that denoises, perhaps inside DDP."""


@dataclass(frozen=True)
class Levels:
    """Noise levels of B rows. `timestep` [B]: what the network is told. `signal`, `spread` [B] fp32: a and b of x."""

    timestep: Tensor
    signal: Tensor
    spread: Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    def select(self, rows: Tensor | slice) -> Levels:
        """The given rows (long indices or a slice); an index may come any number of times."""
        return Levels(self.timestep[rows], self.signal[rows], self.spread[rows])

    def to(self, device: torch.device | str) -> Levels:
        return Levels(self.timestep.to(device), self.signal.to(device), self.spread.to(device))

    def snr(self) -> Tensor:
        """Signal-to-noise ratios a^2 / b^2 [B]; infinite at b = 0."""
        return (self.signal / self.spread).square()


class Denoiser(ABC):
    """The noise levels of a diffusion model at one image size. It holds no weights: networks are passed in.

    `prediction`: what the network predicts. `renoises`: whether a few-step sampler puts fresh noise on its estimate of
    the clean image between steps (consistency sampling), or keeps the noise that the estimate implies (ODE).
    """

    prediction: Prediction
    renoises: bool

    @abstractmethod
    def levels(self, u: Tensor) -> Levels:
        """The levels of training at `u` [B] in [0, 1], from the clean image to pure noise, on the device of `u`."""

    @abstractmethod
    def sampling_levels(self, steps: int) -> Levels:
        """The levels [steps] at which a sampler of so many steps asks the network, noisiest first, on the CPU."""

    @abstractmethod
    def predict(
        self, network: Network, noisy: Tensor, levels: Levels, condition: Any, *, guidance_scale: float = 1.0
    ) -> Tensor:
        """What `network` predicts at `noisy` [B, C, h, w], fp32; `condition` is the family's, of B rows."""

    def noised(self, clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """a x0 + b e, fp32 [B, C, h, w]."""
        signal, spread = _coefficients(levels, clean)
        return signal * clean.float() + spread * noise.float()

    def target(self, clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """What the network should predict at `noised(clean, noise, levels)`, fp32 [B, C, h, w]."""
        if self.prediction == "epsilon":
            return noise.float()
        if self.prediction == "velocity":
            return noise.float() - clean.float()
        signal, spread = _coefficients(levels, clean)
        return signal * noise.float() - spread * clean.float()

    def clean(self, prediction: Tensor, noisy: Tensor, levels: Levels) -> Tensor:
        """The x0 that `prediction` at `noisy` implies, fp32 [B, C, h, w]."""
        signal, spread = _coefficients(levels, noisy)
        if self.prediction == "epsilon":
            return (noisy.float() - spread * prediction.float()) / signal
        if self.prediction == "velocity":
            return noisy.float() - spread * prediction.float()
        return signal * noisy.float() - spread * prediction.float()

    def step(self, clean: Tensor, noisy: Tensor, levels: Levels, after: Levels, noise: Tensor) -> Tensor:
        """From the estimate `clean` made at `noisy` to the sampler's next level: with `noise` where the sampler
        `renoises`, else with the noise that `clean` implies. fp32 [B, C, h, w]."""
        if not self.renoises:
            signal, spread = _coefficients(levels, noisy)
            noise = (noisy.float() - signal * clean.float()) / spread
        return self.noised(clean, noise, after)


def _coefficients(levels: Levels, like: Tensor) -> tuple[Tensor, Tensor]:
    """a and b, each [B, 1, 1, 1], on the device of `like`. Raises ValueError unless there is one level per row."""
    if len(levels) != len(like):
        raise ValueError(f"{len(levels)} noise levels for {len(like)} rows")
    shape = (-1, *[1] * (like.ndim - 1))
    return levels.signal.to(like.device).view(shape), levels.spread.to(like.device).view(shape)
