"""What every method hands back to a trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class MethodLoss:
    """One term of an optimizer step.

    loss: scalar with gradient, a mean over the `rows` samples of the term. metrics: detached 0-dim figures, means over
    the same samples unless their name ends in ``_max``.
    """

    loss: Tensor
    rows: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
