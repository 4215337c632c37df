"""Frechet distance between two clouds of features taken as Gaussians (Heusel et al., 2017, arXiv:1706.08500), in fp64.

N features of D numbers each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, mean [D] and scatter [D, D] (sum of outer products of the deviations) of features that came in pieces.

    Pieces are merged by the formula of Chan et al. (1979), which is exact: it loses nothing where the mean is large.
    """

    dimension: int
    count: int = 0
    mean: Tensor = field(init=False)
    scatter: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.dimension, dtype=torch.float64)
        self.scatter = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> Self:
        """Adds features [N, D] on any device. Raises ValueError for another width, or values that are not finite."""
        features = features.detach().to("cpu", torch.float64)
        if features.ndim != 2 or features.shape[1] != self.dimension or not features.isfinite().all():
            raise ValueError(f"features must be [N, {self.dimension}] and finite, got {list(features.shape)}")
        if len(features):
            mean = features.mean(dim=0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other: Moments) -> Self:
        """Adds what `other` has seen."""
        self._add(other.count, other.mean, other.scatter)
        return self

    def covariance(self) -> Tensor:
        """[D, D], unbiased. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return self.scatter / (self.count - 1)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not count:
            return
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def moments_of(pieces: Iterable[Tensor], dimension: int) -> Moments:
    """Those of features [N, D] in pieces."""
    moments = Moments(dimension)
    for piece in pieces:
        moments.update(piece)
    return moments


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), >= 0 up to rounding.

    Raises ValueError for fewer than two features on a side, and for two widths.
    """
    if one.dimension != other.dimension:
        raise ValueError(f"features of {one.dimension} and of {other.dimension} numbers cannot be compared")
    first, second = one.covariance(), other.covariance()
    # With S = A A', tr (S1 S2)^(1/2) is the sum of the singular values of A1' A2. Roots of the eigenvalues of S1 S2
    # would lose half of the digits where a covariance is singular, as it is with fewer pictures than dimensions.
    overlap = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    shift = (one.mean - other.mean).square().sum()
    return (shift + first.trace() + second.trace() - 2 * overlap).item()


def _factor(covariance: Tensor) -> Tensor:
    """A [D, r] with A A' = the positive semi-definite `covariance` of rank r."""
    values, vectors = torch.linalg.eigh(covariance)
    rank = values > len(values) * torch.finfo(values.dtype).eps * values[-1]  # what is less is rounding of nothing
    return vectors[:, rank] * values[rank].sqrt()
