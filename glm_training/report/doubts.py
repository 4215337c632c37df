"""What may speak against a gain: monitors at their limits, figures that fell meanwhile, prompts learned by heart."""

from __future__ import annotations

from collections.abc import Sequence

from glm_training.report.comparison import changes
from glm_training.report.monitors import Watched, worst
from glm_training.report.run import Run
from glm_training.utils.figure_names import label
from glm_training.utils.words import listed

GAP = "gap_change/total"


def doubts(run: Run, monitors: Sequence[Watched]) -> list[str]:
    """A line for each that the run can tell of, whether it speaks against the gain or not."""
    lines = [*over_limits(monitors)]
    if monitors and not lines:
        most = worst(monitors)
        within = f"all {len(monitors)} are within their limits now, {most.name} is nearest ({most.used:.0%} of its own)"
        if len(monitors) == 1:
            within = f"{most.name} is within its limit now, at {most.used:.0%} of it"
        lines.append(f"Monitors: {within}{_before(monitors)}")
    fell = [label(row.figure) for row in changes(run) if row.better == -1]
    if fell:
        lines.append(f"Worse than at the start: {listed(fell)}")
    gap, evaluated = run.figures.get(GAP), run.evaluated("total")
    last = None if gap is None else gap.last()
    if last is not None and evaluated is not None and evaluated.on.startswith("held-out"):
        way = "more" if last > 0 else "less"
        lines.append(f"Training prompts have gained {abs(last):.3f} {way} than held-out ones")
    return lines


def over_limits(monitors: Sequence[Watched]) -> list[str]:
    """One line where a monitor is over its limit."""
    over = [one.name for one in monitors if one.used > 1]
    if not over:
        return []
    limits = "is over its limit" if len(over) == 1 else "are over their limits"
    return [f"The reward may be hacked: {listed(over)} {limits} ({len(over)} of {len(monitors)} monitors)"]


def _before(monitors: Sequence[Watched]) -> str:
    were = [one.name for one in monitors if one.tripped]
    return f"; over it before: {listed(were)}" if were else ""
