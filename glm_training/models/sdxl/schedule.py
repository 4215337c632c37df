"""The variance-preserving noise schedule of a diffusers scheduler, as the formulas training needs.

x_t = a_t x0 + b_t e with a_t^2 = alphas_cumprod[t], b_t^2 = 1 - a_t^2. The network predicts e ("epsilon") or
v = a_t e - b_t x0 ("v_prediction", arXiv:2202.00512).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


class NoiseSchedule:
    """The training schedule behind `scheduler`, whichever sampler that is.

    Raises ValueError for a scheduler without alphas_cumprod (flow matching, EDM) or with another prediction type.
    """

    def __init__(self, scheduler: Any) -> None:
        alphas = getattr(scheduler, "alphas_cumprod", None)
        prediction = scheduler.config.get("prediction_type")
        name = type(scheduler).__name__
        if alphas is None:
            raise ValueError(f"scheduler {name} has no alphas_cumprod: SDXL needs a DDPM noise schedule")
        if prediction not in PREDICTIONS:
            raise ValueError(f"scheduler {name} has prediction_type {prediction!r}; known: {', '.join(PREDICTIONS)}")
        self.prediction: str = prediction
        self._alphas = alphas.detach().to("cpu", torch.float32).clone()

    @property
    def length(self) -> int:
        """Number of timesteps T (1000): they run from 0, almost clean, to T - 1, almost noise."""
        return len(self._alphas)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, each ``[B]`` fp32, at `timesteps` ``[B]`` (long, in [0, T)), on their device."""
        alphas = self._at(timesteps)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def _at(self, timesteps: Tensor) -> Tensor:
        if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps must be whole numbers (a long tensor), got {timesteps.dtype}")
        if self._alphas.device != timesteps.device:
            self._alphas = self._alphas.to(timesteps.device)
        return self._alphas[timesteps.long()]
