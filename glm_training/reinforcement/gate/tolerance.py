"""How far a replay may be from its rollout: deviations [B, L] of B samples and L tokens or denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """What the gate lets pass: the largest deviation, or the `average` one where rounding makes single ones large."""

    limit: float
    average: bool = False

    def __str__(self) -> str:
        return f"{self.limit:.0e}" + (" on the average" if self.average else "")

    def passes(self, deviation: Tensor) -> bool:
        """Whether deviations [B, L] stay below; NaN never does."""
        return bool((deviation.mean() if self.average else deviation.max()) <= self.limit)


def tolerance_for(part: str, asked: float | None, low_precision: bool) -> Tolerance:
    """`reward.grpo.gate_tolerance`, or its default.

    In low precision a cached token-by-token decode rounds otherwise than one long pass, so tokens are judged by their
    average; a denoising step is replayed as it was drawn, and its ratio, a mean over latent dims, hardly rounds.
    """
    if asked is not None:
        return Tolerance(asked)
    if not low_precision:
        return Tolerance(1e-4)
    return Tolerance(0.05, average=True) if part == "ar" else Tolerance(1e-3)


def first_above(deviation: Tensor, limit: float) -> tuple[int, int]:
    """(row, column) of the earliest column of [B, L] in which any row is above; NaN counts as above."""
    above = ~(deviation <= limit)
    column = int(above.any(dim=0).int().argmax())
    return int(above[:, column].int().argmax()), column
