"""Which weights lie on the device while a phase of a step runs: those that it uses; the others wait on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from glm_training.engine.parts import Part

Move = Callable[[torch.device], None]
"""Moves what one name stands for to a device; where it lies there already, nothing happens."""

CPU = torch.device("cpu")


def optimizer_of(part: str) -> str:
    """The name of what a part's optimizer remembers."""
    return f"{part} optimizer"


class Residency:
    """Places the `units` of a run, by name, as its phases ask. Without `enabled` all stay where they are.

    Moving changes no bit. It takes the time of copying the weights to and fro: each phase says once what it uses.
    """

    def __init__(self, units: Mapping[str, Move], device: torch.device, *, enabled: bool) -> None:
        self.units = units
        self.device = device
        self.enabled = enabled

    def only(self, *names: str) -> None:
        """From here on the units `names` are on the device, and no others."""
        if not self.enabled:
            return
        unknown = set(names) - self.units.keys()
        if unknown:
            raise KeyError(f"no such units: {', '.join(sorted(unknown))}; there are {', '.join(self.units)}")
        torch.clear_autocast_cache()  # copies of the weights in half precision
        for name, move in self.units.items():  # room first
            if name not in names:
                move(CPU)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for name in names:
            self.units[name](self.device)

    def all(self) -> None:
        """From here on everything is on the device."""
        self.only(*self.units)


def units_of(modules: Mapping[str, Iterable[nn.Module]], parts: Mapping[str, Part]) -> dict[str, Move]:
    """The units of a run: `modules` by name, each trained part's with the copies that are kept of its weights, and
    what each part's optimizer remembers (`optimizer_of`)."""
    units: dict[str, Move] = {name: partial(_move, list(each), parts.get(name)) for name, each in modules.items()}
    return units | {optimizer_of(name): part.place_optimizer for name, part in parts.items()}


def _move(modules: Iterable[nn.Module], part: Part | None, device: torch.device) -> None:
    for module in modules:
        module.to(device)
    if part is not None:
        part.place_copies(device)
