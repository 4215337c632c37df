"""Counts and numbers as a person reads them."""

from __future__ import annotations

import pytest

from glm_training.utils.words import counted, number


def test_one_is_singular_and_all_else_is_not():
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(n, "process", "processes") for n in (1, 3)] == ["1 process", "3 processes"]


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.5, ".3f", "0.500"),
        (-0.0004, ".3f", "0.000"),
        (-0.0006, ".3f", "-0.001"),
        (0.0004, "+.3f", "0.000"),
        (0.25, "+.3f", "+0.250"),
        (-0.0, ".3g", "0"),
        (-1e-9, ".3g", "-1e-09"),
        (float("nan"), ".3f", "nan"),
        (float("-inf"), ".3f", "-inf"),
        (-0.0004, ",.3f", "0.000"),
        (12000.5, ",.1f", "12,000.5"),
        (None, ".3f", "-"),
    ],
)
def test_a_number_that_rounds_to_zero_has_no_sign(value, spec, text):
    assert number(value, spec) == text
