"""Numbers and counts as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

ABSENT = "-"
"""What stands for a number that there is none of."""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 step`, `2 steps`; `plural` where an s is not enough."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {plural or noun + 's'}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])


def number(value: float | None, spec: str = ".3f") -> str:
    """`value` as `spec` says, without the sign of a number that rounds to zero; None is `-`."""
    if value is None:
        return ABSENT
    text = format(value, spec)
    try:
        return text.lstrip("+-") if float(text) == 0 else text
    except ValueError:  # of a kind that float does not read back, as 12,000
        return text
