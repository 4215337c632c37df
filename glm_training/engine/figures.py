"""Figures of many terms and processes brought together for the log."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_training.utils.distributed import World, gather_objects


def mean_over_processes(world: World, metrics: dict[str, float]) -> dict[str, float]:
    """Means of each figure over the processes that have it; the largest where the name ends in ``_max``."""
    rows = gather_objects(world, metrics)
    merged: dict[str, float] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row[name] for row in rows if name in row]
        merged[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return merged


def stack_means(metrics: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Row-weighted means of 0-dim tensors of many terms (the largest for ``_max``), read from the device once."""
    if not metrics:
        return {}
    names = list(dict.fromkeys(name for _, row in metrics for name in row))
    columns = []
    for name in names:
        have = [(rows, row[name].float()) for rows, row in metrics if name in row]
        values = torch.stack([value for _, value in have])
        weights = torch.tensor([float(rows) for rows, _ in have], device=values.device)
        columns.append(values.max() if name.endswith("_max") else (values * weights).sum() / weights.sum())
    return dict(zip(names, torch.stack(columns).tolist(), strict=True))
