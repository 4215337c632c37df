"""Held-out items that are judged without drawing anything: preference pairs, or target images.

Every item is judged at the same noise at each evaluation, and in the same pass of the network whatever the number of
processes, so two evaluations differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.utils.distributed import World, gather_tensor
from glm_training.utils.words import counted

LEVELS = 4
"""Noise levels at which an item is judged: one from each quarter of the schedule."""


@dataclass(frozen=True)
class Subject:
    """What figures are about: the name of one ("held-out pair"), the prompt of each, and a digest of all that the
    figures depend on besides the weights."""

    name: str
    prompts: tuple[str, ...]
    digest: str

    def __str__(self) -> str:
        return counted(len(self.prompts), self.name)


def passes(
    count: int,
    size: int,
    world: World,
    wanted: Sequence[int] | None = None,
    *,
    pixels: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[list[int], bool]]:
    """This process' passes over the rows 0..count-1, `size` at once, and whether each counts. `pixels`: height and
    width of each row's pictures, of which those of a pass have one; None where all have.

    The same rows go through the network together whatever the number of processes, and whichever rows are `wanted` (all
    of them by default): only passes without any of those are left out. Networks in shards, and stops, need all
    processes in step: one that has fewer passes than the others repeats one.
    """
    alike = [list(range(count))] if pixels is None else by_size(pixels)
    groups = [rows[start : start + size] for rows in alike for start in range(0, len(rows), size)]
    if wanted is not None:
        asked = set(wanted)
        groups = [group for group in groups if asked & set(group)]
    mine = groups[world.rank :: world.world_size]
    most = len(groups[:: world.world_size])
    return [(group, True) for group in mine] + [(groups[0], False)] * (most - len(mine))


def by_size(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The rows of each size, in order; sizes in the order in which they come first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(sizes):
        groups.setdefault(size, []).append(row)
    return list(groups.values())


class RowFigures:
    """Figures per row of `count`, of several passes and processes; a row's own is the mean of all it was given."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._given: dict[str, list[tuple[list[int], Tensor]]] = {}

    def add(self, rows: Sequence[int], figures: Mapping[str, Tensor], *, counts: bool = True) -> None:
        """Takes figures [len(rows)] by name; nothing waits for the device. Those of a repeated pass do not count."""
        for name, values in figures.items():
            given = self._given.setdefault(name, [])
            if counts:
                given.append((list(rows), values.detach()))

    def gathered(self, world: World) -> dict[str, Tensor]:
        """[count] fp32 by name on the CPU, on every process, each of which knows the same names: a collective. NaN for
        a row without any."""
        names = list(self._given)
        sums = torch.zeros(1, len(names), 2, self._count, dtype=torch.float64)
        for column, name in enumerate(names):
            for rows, values in self._given[name]:
                places = torch.tensor(rows)
                sums[0, column, 0].index_add_(0, places, values.double().cpu())
                sums[0, column, 1].index_add_(0, places, torch.ones(len(rows), dtype=torch.float64))
        total, number = gather_tensor(world, sums).sum(0).unbind(1)
        return dict(zip(names, (total / number).float(), strict=True))
