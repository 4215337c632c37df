"""The name of the best checkpoint: what is read as one, and which score takes its place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from glm_training.checkpoint.best import Best, read_best
from glm_training.checkpoint.commit import name_best


def best_of(step: int, score: float = 0.5) -> Best:
    return Best(f"step-{step:06d}", step, "eval/total", score, higher_is_better=True)


@pytest.mark.parametrize(
    "text", ["", "step-000001\n", "step-000001\n{}\n", "../../x\n{record}\n", "\x00", "{record}\n"]
)
def test_a_best_that_nobody_wrote_so_is_none(tmp_path, text):
    record = best_of(1).encoded().decode().splitlines()[1]
    (tmp_path / "best").write_text(text.replace("{record}", record))
    assert read_best(tmp_path) is None
    name_best(tmp_path, None)
    assert (tmp_path / "best").exists(), "what is not the run's stays"
    (tmp_path / "best").write_text(f"step-000001\n{record}\n")
    assert read_best(tmp_path) == best_of(1)


@pytest.mark.parametrize("higher", [True, False])
def test_of_ties_the_earlier_stays_and_nan_never_wins(higher):
    best = replace(best_of(1), higher_is_better=higher)
    assert [best.beaten_by(score) for score in (0.25, 0.5, 0.75, math.nan)] == [not higher, False, higher, False]
