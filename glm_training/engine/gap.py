"""The gap between the rewards of training prompts and the scores of evaluation prompts: what is learned by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glm_training.engine.figures import Mean
from glm_training.engine.summary import Subject, only_metric, score_label
from glm_training.evaluation.held_out import Evaluation
from glm_training.utils.console import Console
from glm_training.utils.figure_names import RIGHT
from glm_training.utils.words import counted, number

Rewards = dict[str, list[float]]
"""Of one training step: metric name ("total" and each component) -> the mean of its samples and their number."""

UNSELECTED = "reward/total_before_resampling"


class TrainingRewards:
    """Rewards of the first `window` reward steps and of the latest ones, to be held against an evaluation.

    Steps have different prompts, so that one alone says little. The steps are counted from the evaluation on with which
    later ones are compared, as a rule from the start of the run.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._steps = 0
        self._first: list[Rewards] = []
        self._latest: list[Rewards] = []

    def add(self, components: Sequence[str], figures: Mapping[str, float]) -> None:
        """Takes the rewards of a step, total and `components`, from its figures, which are those of all processes.

        Where groups were drawn anew the components are of the groups that were kept, which says nothing of a prompt as
        it comes: then the total before that is taken alone.
        """
        names = {name: f"reward/{name}" for name in ("total", *components)}
        if UNSELECTED in figures:
            names = {"total": UNSELECTED}
        given = {name: figures[tag] for name, tag in names.items() if tag in figures}
        if not given:
            return
        row = {name: [float(value), getattr(value, "weight", 1.0)] for name, value in given.items()}
        if self._steps == len(self._first) < self._window:  # no later one, where a resumed run has a wider window
            self._first.append(row)
        self._steps += 1
        self._latest = [*self._latest, row][-self._window :]

    def gaps(self, before: Evaluation, now: Evaluation) -> dict[str, float]:
        """`gap/<name>`: the mean over the samples of the latest steps minus that of the evaluation `now`.
        `gap_change/<name>`: by how much more the one has risen from the first steps than the other from `before`; once
        no step is both a first and a latest one."""
        scores, means = now.means(), self._means(now)
        figures = {f"gap/{name}": mean - scores[name] for name, mean in means.items()}
        changes = {name: self.change(name, before, now)[0] for name in means}
        return figures | {f"gap_change/{name}": value for name, value in changes.items() if value is not None}

    def change(self, name: str, before: Evaluation, now: Evaluation) -> tuple[float | None, float | None]:
        """The change of the gap of a figure, and its standard error: over steps, whose prompts differ, and over the
        prompts of the evaluation, which are the same in both. None for what cannot be told."""
        first, latest = _column(self._first, name), _column(self._latest, name)
        if self._steps < 2 * self._window or not first or name not in before.scores:
            return None, None
        paired = (now.scores[name] - before.scores[name]).double()
        paired = paired[~paired.isnan()]
        if not len(paired):
            return None, None
        change = _mean(latest) - _mean(first) - paired.mean().item()
        if min(len(first), len(latest), len(paired)) < 2:
            return change, None
        return change, math.sqrt(_squared_error(first) + _squared_error(latest) + paired.var().item() / len(paired))

    def write_table(self, console: Console, prompts: Subject, before: Evaluation, now: Evaluation) -> None:
        """Prints the latest rewards beside the scores of the evaluation's `prompts`, the gap and how it has changed."""
        alone, means = only_metric(before, now), now.means()
        rows = []
        for name, mean in sorted(self._means(now).items(), key=lambda item: item[0] != RIGHT):
            if name != alone:
                change, error = self.change(name, before, now)
                texts = number(mean), number(means[name]), number(mean - means[name], "+.3f")
                rows.append([score_label(name, alone), *texts, number(change, "+.3f"), number(error)])
        if rows:
            steps = counted(len(self._latest), "step")
            title = f"Training prompts of the last {steps} beside {prompts}"
            console.table(title, ["score", "training", "evaluated", "gap", "change", "standard error"], rows)

    def _means(self, now: Evaluation) -> dict[str, float]:
        """Of the latest steps, for each figure that the evaluation `now` has too."""
        columns = {name: _column(self._latest, name) for name in now.means() if name in now.scores}
        return {name: _mean(column) for name, column in columns.items() if column}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self._steps, "first": self._first, "latest": self._latest}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, for the window that is set now."""
        self._steps = state["steps"]
        self._first, self._latest = list(state["first"])[: self._window], list(state["latest"])[-self._window :]


def _column(rows: Sequence[Rewards], name: str) -> list[Mean]:
    """The means of the steps that have the figure."""
    return [Mean(*row[name]) for row in rows if name in row]


def _mean(steps: Sequence[Mean]) -> float:
    """Over the samples of all `steps`."""
    total = sum(step.weight for step in steps)
    return sum(step * (step.weight / total) for step in steps)


def _squared_error(steps: Sequence[Mean]) -> float:
    """The squared standard error of the mean of several steps, from how their means differ."""
    middle = sum(steps) / len(steps)
    return sum((step - middle) ** 2 for step in steps) / (len(steps) - 1) / len(steps)
