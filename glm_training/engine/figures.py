"""Figures of many terms, processes and steps brought together for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm_training.utils.distributed import World, gather_objects

MAXIMUM = "_max"
"""What the name of a figure ends in that is the largest of its values wherever several come together."""
COUNTS = ("reward/zero_spread_groups", "reward/skipped_samples", "reward/resampled_groups")
"""Figures that add up over steps."""
STANDINGS = ("learning_rate", "found_rate", "loss_scale", "skipped_updates", "real_scale")
"""Last parts of the names of figures that say where something stands: the latest counts."""


def is_timed(name: str) -> bool:
    """Whether a figure tells of the machine: two runs of one seed agree in all others."""
    return name.startswith(("time/", "memory/")) or name.endswith("_per_second")


class Mean(float):
    """A figure that is a mean over `weight` of something: samples, or seconds for a rate. Where means of several steps
    come together, each counts by its weight; a plain number counts once."""

    weight: float

    def __new__(cls, value: float, weight: float = 1.0) -> Mean:
        figure = super().__new__(cls, value)
        figure.weight = float(weight)
        return figure


class Interval:
    """The figures of the steps since the last logged line: the mean over the steps that have each, by its weight; the
    sum of counts, the largest of maxima, the latest of standings."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, float]] = {}  # name -> (value, weight so far)

    def add(self, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        for name, figure in figures.items():
            value, weight = float(figure), figure.weight if isinstance(figure, Mean) else 1.0
            if name not in self._kept:
                self._kept[name] = (value, weight)
                continue
            kept, so_far = self._kept[name]
            ours = not name.startswith("reward/")  # where metrics have the names that users give them
            if name in COUNTS:
                value += kept
            elif ours and name.endswith(MAXIMUM):
                value = _largest([kept, value])
            elif not (ours and name.rpartition("/")[2] in STANDINGS) and so_far + weight > 0:
                # in this form the mean of equal values is their value, bit for bit
                value = kept + (value - kept) * (weight / (so_far + weight))
            self._kept[name] = (value, so_far + weight)

    def figures(self) -> dict[str, float]:
        """What the log is told, what tells of the machine last."""
        return {name: self._kept[name][0] for name in sorted(self._kept, key=is_timed)}

    def clear(self) -> None:
        """Begins the next one."""
        self._kept.clear()

    def state(self) -> dict[str, Any]:
        """What a run that resumes within the interval goes on from; what tells of the machine begins anew there."""
        return {name: list(kept) for name, kept in self._kept.items() if not is_timed(name)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave."""
        self._kept = {name: (value, weight) for name, (value, weight) in state.items()}


def mean_divisor(total: int, rows: int, world: World) -> float:
    """By what the mean loss of a chunk of `rows` rows is divided, so that the gradients of a step, which all processes
    then average, are those of the plain mean over its `total` rows: the number of chunks, where all have equally many.
    """
    return total / (rows * world.world_size)


def mean_over_processes(world: World, metrics: dict[str, float], rows: float = 1.0) -> dict[str, float]:
    """Means of each figure over the processes that have it, each counting by the `rows` it has seen; the largest where
    the name ends in ``_max``."""
    everywhere = gather_objects(world, (metrics, rows))
    merged: dict[str, float] = {}
    for name in dict.fromkeys(key for figures, _ in everywhere for key in figures):
        values = [(figures[name], weight) for figures, weight in everywhere if name in figures]
        if name.endswith(MAXIMUM):
            merged[name] = _largest([value for value, _ in values])
        else:
            total = sum(weight for _, weight in values)
            merged[name] = Mean(sum(value * (weight / total) for value, weight in values), total)
    return merged


def _largest(values: Sequence[float]) -> float:
    """NaN where there is one: `max` would let it pass."""
    return next((value for value in values if value != value), max(values))


def stack_means(metrics: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, float]:
    """Row-weighted means of 0-dim tensors of many terms (the largest for ``_max``), read from the device once."""
    if not metrics:
        return {}
    names = list(dict.fromkeys(name for _, row in metrics for name in row))
    columns = []
    for name in names:
        have = [(rows, row[name].float()) for rows, row in metrics if name in row]
        values = torch.stack([value for _, value in have])
        weights = torch.tensor([float(rows) for rows, _ in have], device=values.device)
        columns.append(values.max() if name.endswith(MAXIMUM) else (values * weights).sum() / weights.sum())
    return dict(zip(names, torch.stack(columns).tolist(), strict=True))
