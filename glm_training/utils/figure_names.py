"""What figures are called for a person, and which way they should go."""

from __future__ import annotations

RIGHT = "exactly_right"
"""The figure that stands first, where there is one."""

HIGHER_IS_BETTER = {"accuracy": True, "margin": True, "loss": False, "chosen_error": False, "psnr": True}
"""Last part of the name of a judged figure -> which way it should go, where there is one."""


def label(name: str) -> str:
    """What a figure is called on the terminal and the page."""
    known = {
        "total": "reward",
        "ar_total": "AR half's reward",
        "dit_total": "DiT half's reward",
        RIGHT: "exactly right",
    }
    return known.get(name, name.replace("/", " "))


def direction(name: str) -> bool | None:
    """Whether a judged figure should rise; None where neither is better."""
    return HIGHER_IS_BETTER.get(name.rpartition("/")[2])
