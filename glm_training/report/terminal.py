"""What `glm-train report` says on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from glm_training.report.comparison import Comparison, Row, better_when_higher, changes, spec_for
from glm_training.report.doubts import doubts, over_limits
from glm_training.report.monitors import Watched, watched
from glm_training.report.run import Run
from glm_training.utils.console import Console
from glm_training.utils.figure_names import label
from glm_training.utils.statistics import Estimate
from glm_training.utils.words import ABSENT, number


def told(console: Console, runs: Sequence[Run], comparison: Comparison | None) -> None:
    """The verdict first; then what it rests on, in lines and a table."""
    console.line(headline(runs[0]) if comparison is None else comparison.headline)
    for line in below(runs, [watched(run) for run in runs], comparison):
        console.line(f"  {line}")
    if comparison is not None and comparison.rows:
        headers = ["figure", *comparison.names, "difference", "95 % interval", ""]
        console.table("Evaluated last", headers, [_cells(row, comparison.names) for row in comparison.rows])
    for run in runs:
        for problem in run.problems:
            console.line(f"note: {run.name}: {problem}")


def below(runs: Sequence[Run], monitors: Sequence[Sequence[Watched]], comparison: Comparison | None) -> list[str]:
    """The lines under the verdict: what speaks against the gain of a run, or what a comparison rests on."""
    if comparison is None:
        return doubts(runs[0], monitors[0])
    over = zip(runs, map(over_limits, monitors), strict=True)
    return [*comparison.details, *(f"{run.name}: {line}" for run, lines in over for line in lines)]


def headline(run: Run) -> str:
    """What a run has come to, in one sentence."""
    total = "" if run.total_steps is None else f" of {run.total_steps}"
    start = f"{run.name}, {run.state} at step {run.step}{total}"
    row = progress(run)
    if row is None:
        return f"{start}: no two evaluations to compare"
    spec = spec_for(row.difference)
    outcome = {1: "better", -1: "worse", 0: "no change that can be told"}.get(row.better or 0, "")
    prompts = f"{row.difference.count} {_on(run, row.figure)}"
    return (
        f"{start}: {label(row.figure)} {number(row.means[0], spec)} -> {number(row.means[1], spec)} on {prompts} "
        f"({difference(row.difference, spec)}), {outcome}"
    )


def progress(run: Run) -> Row | None:
    """The deciding figure of a run from its first evaluation to its last; None where there are no two."""
    return next((row for row in changes(run) if better_when_higher(row.figure) is not None), None)


def difference(found: Estimate, spec: str) -> str:
    """A difference with its interval."""
    by = number(found.mean, f"+{spec}")
    if found.low is None or found.high is None:
        return by
    return f"{by}, 95 % interval {number(found.low, f'+{spec}')} to {number(found.high, f'+{spec}')}"


def _on(run: Run, figure: str) -> str:
    evaluated = run.evaluated(figure)
    return "prompts" if evaluated is None else evaluated.on


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    spec, found = spec_for(row.difference), row.difference
    between = ABSENT
    if found.low is not None and found.high is not None:
        between = f"{number(found.low, f'+{spec}')} to {number(found.high, f'+{spec}')}"
    means = [number(mean, spec) for mean in row.means]
    return [label(row.figure), *means, number(found.mean, f"+{spec}"), between, verdict(row, names)]


def verdict(row: Row, names: Sequence[str] | None) -> str:
    """Of two runs with their `names` which is better; else whether one has become better or worse."""
    if not row.paired:
        return "other prompts"
    if row.same:
        return "same"
    if not row.better:
        return "" if row.better is None else "cannot be told"
    if names is None:
        return "better" if row.better > 0 else "worse"
    return f"{names[1] if row.better > 0 else names[0]} better"
