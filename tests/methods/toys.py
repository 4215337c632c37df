"""Policies of one weight on latents of two numbers, whose losses can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.dit_types import DiTCondition, FlowSchedule, Trajectory

SCHEDULE = FlowSchedule(torch.tensor([900.0, 600.0, 300.0]), torch.tensor([1.0, 0.8, 0.5, 0.0]))


class ToyVelocity(nn.Module):
    """velocity = weight * latents + timestep / 1000; `calls` keeps what it was given, and whether with gradient."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.calls: list[dict[str, Any]] = []

    def forward(self, latents: Tensor, times: Tensor, condition: Any, guidance_scale: float = 1.0) -> Tensor:
        given = {"latents": latents, "times": times, "condition": condition, "guidance": guidance_scale}
        self.calls.append(given | {"weight": self.weight.item(), "gradient": torch.is_grad_enabled()})
        return self.weight * latents + times.view(-1, 1, 1, 1) / 1000

    @contextmanager
    def at(self, weight: float) -> Iterator[None]:
        """Inside, the weight is another one, without gradient."""
        own = self.weight.data
        self.weight.data = torch.tensor(weight)
        try:
            with torch.no_grad():
                yield
        finally:
            self.weight.data = own


def condition_of(rows: int) -> DiTCondition:
    glyph, mask = torch.zeros(rows, 1, 1), torch.ones(rows, 1, dtype=torch.bool)
    return DiTCondition(torch.zeros(rows, 1, dtype=torch.long), (1, 1), glyph, mask, 32, 32)


def trajectory_of(final: Tensor, *, guidance_scale: float = 1.0, **changed: Any) -> Trajectory:
    """Latents [B, 1, 1, 2] at the end of `SCHEDULE`; nothing of the way unless it is given."""
    options: dict[str, Any] = {"sde_indices": (), "log_probs": torch.zeros(len(final), 0), "kernel": "flow"}
    options |= {"eta": 0.5, "stored": None, "stored_steps": ()} | changed
    return Trajectory(
        final=final, condition=condition_of(len(final)), schedule=SCHEDULE, guidance_scale=guidance_scale, **options
    )


def prompt_of(rows: int, *, preview: bool = True) -> ARPrompt:
    """Two preview tokens (1 x 2) and four of the large grid (2 x 2), or the large grid alone."""
    grids = ((1, 2), (2, 2)) if preview else ((2, 2),)
    length = sum(a * b for a, b in grids)
    places = torch.zeros(3, rows, length, dtype=torch.long)
    ids = torch.zeros(rows, 3, dtype=torch.long)
    return ARPrompt(ids, torch.ones_like(ids), places[:, :, :3], places, grids, 2 if preview else 0)
