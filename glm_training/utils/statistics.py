"""Means over prompts with their intervals, by Student's t distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, over `count` prompts. `low`, `high`: the interval that holds the true one in
    `CONFIDENCE` of such cases; None where one value says nothing of a spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where zero lies outside of the interval, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean of finite `values`, mean +/- t(n - 1) * s / sqrt(n); None of none."""
    if not values:
        return None
    mean, count = fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = _t(confidence, count - 1) * math.sqrt(variance(values) / count)
    return Estimate(mean, mean - half, mean + half, count)


def welch(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean of `second` minus that of `first`, which are of other things, with the degrees of freedom of Welch
    (1947); None where either is empty. `count` is the smaller of the two."""
    if not first or not second:
        return None
    difference, count = fmean(second) - fmean(first), min(len(first), len(second))
    if count < 2:
        return Estimate(difference, None, None, count)
    one, two = variance(first) / len(first), variance(second) / len(second)
    if one + two == 0:
        return Estimate(difference, difference, difference, count)
    freedom = (one + two) ** 2 / (one**2 / (len(first) - 1) + two**2 / (len(second) - 1))
    half = _t(confidence, freedom) * math.sqrt(one + two)
    return Estimate(difference, difference - half, difference + half, count)


def _t(confidence: float, freedom: float) -> float:
    """How many standard errors the two-sided interval reaches to either side."""
    from scipy.special import stdtrit  # late: it takes a moment, and a page may need none

    return float(stdtrit(freedom, 0.5 + confidence / 2))
