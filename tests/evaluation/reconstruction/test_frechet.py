"""The Frechet distance against closed forms, and moments that come in pieces against those of the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glm_training.evaluation.reconstruction.frechet import Moments, frechet_distance, moments_of

EPS = torch.finfo(torch.float64).eps


def gaussian(mean, covariance, count=11) -> Moments:
    """Moments of `count` features with this mean and covariance."""
    moments = Moments(len(mean), count)
    moments.mean = torch.tensor(mean, dtype=torch.float64)
    moments.scatter = (count - 1) * torch.as_tensor(covariance, dtype=torch.float64)
    return moments


def rotation(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def close(value: float, expected: float, scale: float = 10.0) -> bool:
    """Within the rounding of a few dozen operations on numbers of size `scale`."""
    return abs(value - expected) <= 1000 * EPS * scale


def test_the_same_gaussian_is_no_distance_away():
    covariance = rotation(0.3) @ torch.diag(torch.tensor([4.0, 0.25]).double()) @ rotation(-0.3)
    assert close(frechet_distance(gaussian([1, -2], covariance), gaussian([1, -2], covariance)), 0)


def test_shifted_means_are_their_squared_distance_away():
    covariance = [[2.0, 0.5], [0.5, 1.0]]
    assert close(frechet_distance(gaussian([0, 0], covariance), gaussian([3, -4], covariance)), 25, 25)


def test_diagonal_covariances_differ_by_their_standard_deviations():
    # (2 - 1)^2 + (3 - 5)^2 + (0 - 2)^2, and 1 of the means
    one, other = gaussian([0, 0, 0], np.diag([4.0, 9, 0])), gaussian([0, 1, 0], np.diag([1.0, 25, 4]))
    assert close(frechet_distance(one, other), 1 + 4 + 4 + 1, 30)
    assert close(frechet_distance(other, one), 10, 30)


def test_covariances_that_do_not_commute():
    """For 2x2, tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det A det B)), from the eigenvalues of AB."""
    first, turned = torch.diag(torch.tensor([9.0, 1.0]).double()), rotation(math.pi / 4)
    second = turned @ torch.diag(torch.tensor([4.0, 16.0]).double()) @ turned.T  # [[10, -6], [-6, 10]]
    # tr AB = 9 * 10 + 1 * 10 = 100, det A det B = 9 * 64, so the root's trace is sqrt(100 + 2 * 24) = sqrt(148)
    assert close(frechet_distance(gaussian([0, 0], first), gaussian([0, 0], second)), 10 + 20 - 2 * math.sqrt(148), 100)


def test_singular_covariances_of_fewer_pictures_than_dimensions():
    """Of rank one, S1 = a uu' and S2 = b vv': tr (S1 S2)^(1/2) = sqrt(ab) |u.v|."""
    u, v = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    u[0], v[0], v[1] = 1, 0.6, 0.8
    scales = torch.tensor([-1.0, 0, 1]).double()  # of variance 1
    one = moments_of([torch.outer(3 * scales, u)], 64)
    other = moments_of([torch.outer(2 * scales, v)], 64)
    assert close(frechet_distance(one, other), 9 + 4 - 2 * 6 * 0.6)
    # of the same few pictures nothing is left but rounding: no root of it
    features = 5 + torch.randn(10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = moments_of([features], 64)
    assert abs(frechet_distance(same, moments_of([features], 64))) <= 64 * 64 * EPS * same.covariance().trace().item()


def test_pictures_that_are_all_the_same_have_no_spread():
    one, other = moments_of([torch.full((4, 3), 2.0)], 3), moments_of([torch.full((5, 3), 4.0)], 3)
    assert frechet_distance(one, other) == 12
    spread = moments_of([torch.tensor([[1.0, 2, 2], [3, 2, 2]])], 3)  # the mean of `one`, and variance 2
    assert close(frechet_distance(one, spread), 2)


def test_moments_in_pieces_are_those_of_the_whole():
    features = torch.randn(37, 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 2, 3, 4, 5.0])
    features += torch.tensor([0.0, 1e4, -1e4, 7, 0])  # a mean far from 0 costs no digits
    whole = features.double().numpy()
    pieces = moments_of([features[:1], features[1:1], features[1:20], features[20:]], 5)
    halves = moments_of([features[:18]], 5).merge(moments_of([features[18:]], 5)).merge(Moments(5))
    for moments in (pieces, halves, Moments(5).merge(pieces)):
        assert moments.count == 37
        # fp64 of numbers up to 1e4 and 37 terms; sums of squares would lose 1e8 / 1 of that
        np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=100 * EPS, atol=1e4 * 100 * EPS)
        np.testing.assert_allclose(moments.covariance(), np.cov(whole, rowvar=False), atol=1e4 * 1000 * EPS)


@pytest.mark.parametrize("features", [torch.zeros(2, 4), torch.zeros(5), torch.tensor([[0, 0, 0, 0, math.nan]])])
def test_features_that_are_none(features):
    with pytest.raises(ValueError, match=r"\[N, 5\] and finite"):
        Moments(5).update(features)


def test_one_picture_has_no_covariance_and_widths_must_agree():
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(moments_of([torch.zeros(1, 2)], 2), moments_of([torch.zeros(2, 2)], 2))
    with pytest.raises(ValueError, match="2 and of 3"):
        frechet_distance(Moments(2), Moments(3))
