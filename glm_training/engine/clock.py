"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch

from glm_training.utils.distributed import World


class Clock:
    """Seconds per phase of a step. Waits for the GPU at each lap, a handful of times per step."""

    def __init__(self, world: World) -> None:
        self.cuda = world.device.type == "cuda"
        self.laps: dict[str, float] = {}
        self.start = self.mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to `name`."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        key = f"time/{name}_seconds"
        self.laps[key] = self.laps.get(key, 0.0) + now - self.mark
        self.mark = now

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start
