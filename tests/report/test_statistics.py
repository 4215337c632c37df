"""Intervals against values worked out by hand and tables of Student's t."""

from __future__ import annotations

import pytest

from glm_training.utils.statistics import estimate, welch


def test_the_interval_of_a_mean_is_that_of_students_t():
    # 1, 2, 3, 4: mean 2.5, s^2 = 5/3, standard error sqrt(5/12) = 0.6454972; t(3, 0.975) = 3.1824463
    found = estimate([1.0, 2.0, 3.0, 4.0])
    half = 3.1824463 * 0.6454972
    assert (found.mean, found.count) == (2.5, 4)
    assert found.low == pytest.approx(2.5 - half, abs=1e-6)
    assert found.high == pytest.approx(2.5 + half, abs=1e-6)
    assert found.sign == 1


def test_a_wider_interval_for_more_confidence():
    # t(3, 0.995) = 5.8409093
    found = estimate([1.0, 2.0, 3.0, 4.0], 0.99)
    assert found.high == pytest.approx(2.5 + 5.8409093 * 0.6454972, abs=1e-6)
    assert found.sign == 0


def test_one_value_has_no_interval_and_none_has_no_mean():
    found = estimate([0.3])
    assert (found.mean, found.low, found.high, found.sign) == (0.3, None, None, 0)
    assert estimate([]) is None


def test_means_of_different_things_have_welchs_degrees_of_freedom():
    # [0, 2]: mean 1, s^2/n = 1; [3, 5, 4]: mean 4, s^2/n = 1/3. (4/3)^2 / (1/1 + (1/9)/2) = 1.6842105 degrees
    found = welch([0.0, 2.0], [3.0, 5.0, 4.0])
    freedom = (4 / 3) ** 2 / (1 + (1 / 9) / 2)
    assert freedom == pytest.approx(1.6842105)
    assert found.mean == 3.0
    # between t(1) = 12.706 and t(2) = 4.303 standard errors of sqrt(4/3)
    half = found.high - found.mean
    assert 4.3027 * (4 / 3) ** 0.5 < half < 12.7062 * (4 / 3) ** 0.5
    assert found.mean - found.low == pytest.approx(half)


def test_welch_without_any_spread_and_without_values():
    assert welch([1.0, 1.0], [2.0, 2.0]).low == 1.0
    assert welch([], [1.0]) is None
    assert welch([1.0], [2.0, 3.0]).low is None
