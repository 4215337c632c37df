"""Where the time and the memory of a step go."""

from __future__ import annotations

import time

import torch

from glm_training.utils.distributed import World, gather_objects


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


def peak_memory(world: World) -> dict[str, float]:
    """GiB that the process with the most of it held at most since it started: in tensors, and with what torch keeps in
    reserve. Empty off the GPU. A collective; nothing waits for a device."""
    if world.device.type != "cuda":
        return {}
    peaks = torch.cuda.max_memory_allocated(world.device), torch.cuda.max_memory_reserved(world.device)
    allocated, reserved = (max(values) / 2**30 for values in zip(*gather_objects(world, peaks), strict=True))
    return {"memory/allocated_gib_max": allocated, "memory/reserved_gib_max": reserved}
