"""The plan's share of the reward's variance, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from glm_training.utils.words import counted

ONE_HALF_DECIDES = 2 / 3
"""From this part of the reward's spread on, a half is called the one to train."""


def plan_share_reading(share: float) -> str:
    """One line on what `plan_variance_share` in [0, 1] advises; NaN, a share that could not be told, is said to be so.

    Raises ValueError for a share outside [0, 1].
    """
    if math.isnan(share):
        return (
            "the plan's share of the reward's spread cannot be told: "
            "that takes 2 plans per prompt, 2 renders per plan, and rewards that differ"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    plan = round(100 * share)
    if share >= ONE_HALF_DECIDES:
        return f"{plan} % of the reward's spread comes from the plan: train the AR"
    if share <= 1 - ONE_HALF_DECIDES:
        return f"{100 - plan} % of the reward's spread comes from the render: train the DiT"
    return f"{plan} % of the reward's spread comes from the plan, {100 - plan} % from the render: train both"


class ShareReader:
    """The plan's share of the variance over several steps, single ones being noisy, and its reading."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes the share from a step's figures, where there is one."""
        if "reward/plan_variance_share" in metrics:
            self._shares.append(metrics["reward/plan_variance_share"])

    def read(self) -> str | None:
        """The reading of the steps since the last one, None without any."""
        shares, self._shares = self._shares, []
        if not shares:
            return None
        return f"{plan_share_reading(sum(shares) / len(shares))} (mean of {counted(len(shares), 'step')})"

    def state(self) -> list[float]:
        """The shares since the last reading, for a checkpoint."""
        return list(self._shares)

    def load(self, shares: Sequence[float]) -> None:
        """Takes what `state` gave."""
        self._shares = list(shares)
