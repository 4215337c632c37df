"""Held-out prompts one by one: where the last evaluation of a run is better than its first, and where not."""

from __future__ import annotations

from typing import Any

from glm_training.report.comparison import better_when_higher
from glm_training.report.run import Run
from glm_training.utils.figure_names import label

MAX_PROMPTS = 200
MAX_FIGURES = 8


def prompt_rows(run: Run) -> dict[str, Any] | None:
    """The prompts with their figures in the first and the last evaluation; those whose deciding figure moved most
    where there are more than MAX_PROMPTS. None without an evaluation, or prompts without a text."""
    if not run.evaluations:
        return None
    subject = run.evaluations[-1].on
    own = [one for one in run.evaluations if one.on == subject]
    first, last = own[0], own[-1]
    if first.prompts != last.prompts or not any(last.prompts):
        return None
    names = [name for name in last.scores if name in first.scores]
    names.sort(key=lambda name: (name != "total", better_when_higher(name) is None, name.count("/")))
    names = names[:MAX_FIGURES]
    if not names:
        return None
    rows = sorted(
        range(len(last.prompts)), key=lambda row: -_moved(first.scores[names[0]][row], last.scores[names[0]][row])
    )
    rows = rows[:MAX_PROMPTS]
    return {
        "on": subject,
        "steps": [first.step, last.step],
        "of": len(last.prompts),
        "prompts": [last.prompts[row] for row in rows],
        "figures": {name: [[one.scores[name][row] for row in rows] for one in (first, last)] for name in names},
        "names": {name: label(name) for name in names},
        "lower_is_better": [name for name in names if better_when_higher(name) is False],
    }


def _moved(first: float | None, last: float | None) -> float:
    return -1.0 if first is None or last is None else abs(last - first)
