"""A phase of a run in memory."""

from __future__ import annotations

from dataclasses import dataclass

Items = dict[str, float]
"""Bytes by what they are."""


@dataclass(frozen=True)
class Phase:
    """A phase of the run and what lies on a GPU at its peak, by what it is. parts: names of those whose weights do so;
    moments: of those whose moments do."""

    name: str
    items: Items
    parts: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.items.values())
