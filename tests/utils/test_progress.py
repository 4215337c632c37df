"""The progress of a run at every width: step, bar, time left and reward first, the rest as it fits."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console as RichConsole

from glm_training.utils import progress
from glm_training.utils.console import Console
from glm_training.utils.progress import Bar, Lines, Pace, figures, fitting, in_columns

REWARDS = {
    "reward/total": 0.51234, "reward/lpips": 0.3, "ar/loss": -0.0123, "ar/kl": 0.00123, "ar/clip_fraction": 0.25,
    "dit/loss": 1.234, "dit/kl": 0.0123, "dit/clip_fraction": 0.0, "images_per_second": 12.3,
    "tokens_per_second": 1234.5, "time/step_seconds": 1.0,
}  # fmt: skip
PAIRS = {f"{part}/{name}": 0.6931 for part in ("ar", "dit") for name in ("accuracy", "loss", "margin", "grad_norm")}
DISTILLATION = {"dmdr/real_scale": 0.5, "guidance/fake_loss": 0.123, "unet/dmd_loss": 0.5, "unet/reward_loss": 0.4}
WATCHED = {"rewards": (REWARDS, 9), "pairs": (PAIRS, 4), "distillation": (DISTILLATION, 3)}


def test_figures_pick_what_a_person_watches():
    few = {name: REWARDS[name] for name in ("ar/kl", "reward/total", "time/step_seconds", "images_per_second")}
    assert figures(few) == "reward 0.5123  ar kl 0.00123  images/s 12.3"
    assert figures({"ar/loss": -0.0}) == "ar loss 0"


def drawn(metrics: dict[str, float], width: int, step: int = 26, total: int = 500) -> list[str]:
    """The rows on a terminal of `width` columns."""
    out = io.StringIO()
    bar = Bar(total, 0)
    bar.update(step, metrics)
    RichConsole(file=out, width=width, height=24, force_terminal=True, color_system=None).print(bar)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("kind", WATCHED)
@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 128, 160, 200])
def test_everything_is_there_at_every_width_and_nothing_wraps(kind, width):
    metrics, count = WATCHED[kind]
    rows = drawn(metrics, width)
    assert all(len(row) < width for row in rows)
    assert re.match(r"step 26/500 [━╸╺ ]{4,24} +ETA \d+:\d\d:\d\d", rows[0])
    if kind == "rewards" and width >= 50:
        assert "reward 0.5123" in rows[0]
    text = " ".join(rows)
    shown = [label for label in ("reward 0.5123", "ar loss", "dit loss", "dit accuracy", "unet DMD loss", "tokens/s")]
    assert sum(label in text for label in shown) == {"rewards": 4, "pairs": 3, "distillation": 1}[kind]
    assert len(re.findall(r"[a-zA-Z/]+(?: [a-zA-Z/]+)* -?[\d.,]+", text.split("ETA", 1)[1][9:])) == count


def test_a_wide_terminal_has_one_row():
    assert len(drawn(REWARDS, 200)) == 1 and len(drawn(REWARDS, 80)) > 1


def test_a_terminal_that_is_narrower_than_its_head_keeps_the_step():
    rows = drawn(REWARDS, 20, step=12345, total=20000)
    assert rows[0].startswith("step 12345/20000") and all(len(row) < 20 for row in rows)


def test_the_cells_below_stand_in_columns():
    assert in_columns(["a 1", "bb 2", "c 3", "d 4"], 16, 9) == ["a 1   bb 2  c 3", "d 4"]
    assert in_columns(["a 1", "bb 2", "c 3", "d 4"], 4, 2) == ["a 1", "bb 2"]  # as many rows as there is room for


def test_a_line_takes_what_fits():
    assert fitting(["step 1/2", "ETA 0:00:01", "reward 1"], 21) == "step 1/2  ETA 0:00:01"
    assert fitting(["step 1/2", "ETA 0:00:01", "reward 1"], 31) == "step 1/2  ETA 0:00:01  reward 1"
    assert fitting(["step 1/2", "ETA 0:00:01"], 3) == "step 1/2"


@pytest.mark.parametrize(("columns", "longest"), [("40", 40), ("80", 80), ("", 1000)])
def test_away_from_a_terminal_columns_bound_a_line_where_they_are_set(monkeypatch, columns, longest):
    monkeypatch.setenv("COLUMNS", columns)
    out = io.StringIO()
    with Console(output=out).progress(500) as told:
        told.update(26, REWARDS)
        told.update(27, REWARDS)
    for line in out.getvalue().splitlines():
        assert re.match(r"step 2[67]/500  ETA \d+:\d\d:\d\d  reward 0.5123", line) and len(line) <= longest
        assert ("tokens/s 1,234" in line) == (columns == "")


def test_the_time_left_is_that_of_steps_not_of_what_came_before_them(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = Pace(total=10, done=2)
    now[0] = 160.0  # a minute of encoding and the first step
    pace.update(3)
    assert str(pace) == "ETA 0:07:00"  # all that is known by then
    told = Lines(lambda line: None, 10, 2, 1)
    now[0] = 220.0
    told.update(3, {"time/step_seconds": 3.0})
    assert str(told._pace) == "ETA 0:00:21"  # the step took 3 s, seven are left
    now[0] = 164.0
    pace.update(5)
    assert str(pace) == "ETA 0:00:10"  # two steps took 4 s, five are left
    now[0] = 167.0
    assert str(pace) == "ETA 0:00:07"  # it runs while a step does
