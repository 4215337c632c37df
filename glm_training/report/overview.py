"""What stands at the head of a page: what kind of run it is, and its most telling figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from glm_training.report.comparison import better_when_higher, changes, spec_for
from glm_training.report.monitors import Watched, worst
from glm_training.report.run import Run, Series
from glm_training.utils.figure_names import label
from glm_training.utils.words import ABSENT, counted, number

FAMILIES = {"glm_image": "GLM-Image", "sdxl": "SDXL", "vgt": "VGT"}
RECENT = 20
"""Logged lines that the latest figures are means of."""


@dataclass(frozen=True)
class Card:
    """A figure in large letters. `tone`: better, worse, or nothing."""

    title: str
    value: str
    below: str
    tone: str = ""


def subtitle(run: Run) -> str:
    """Family, model, what is trained and how."""
    family, name = run.setting("model.family"), run.setting("model.name")
    words = [FAMILIES.get(str(family), str(family or "")), str(name or "")]
    component = run.setting("model.component")
    if component:
        words.append("both halves" if component == "both" else str(component))
    words.append(method(run))
    if run.record is not None:
        words.append(f"started {run.record.started[:16]}")
    return " · ".join(word for word in words if word)


def method(run: Run) -> str:
    """How it is trained, as far as its figures and settings tell."""
    named = {
        "dpo": "preference pairs (DPO)",
        "dmdr": "distillation to few steps (DMDR)",
        "opd": "distillation of experts",
    }
    chosen = run.setting("training.method")
    if chosen in named:
        return named[chosen]
    if any(tag.startswith("reward/") for tag in run.figures):
        return "reward training"
    return "supervised" if run.config else ""


def cards(run: Run, monitors: Sequence[Watched]) -> list[Card]:
    """At most eight, of what the run has."""
    total = run.total_steps
    found = [Card("steps", f"{run.step:,}", "" if total is None else f"of {total:,}, {run.state}")]
    found += _progress(run)
    for tag in ("ar/kl", "dit/kl"):
        kl = _recent(run.figures.get(tag))
        if kl is not None:
            found.append(
                Card(f"{tag[:-3].upper() if tag == 'ar/kl' else 'DiT'} KL", number(kl, ".3g"), "to the reference")
            )
    if monitors:
        tripped = sum(one.used > 1 for one in monitors)
        most = worst(monitors)
        below = f"{most.name} uses {most.used:.0%}" if most.used <= 10 else f"{most.name} is far over"
        value = f"{len(monitors) - tripped} of {len(monitors)}"
        found.append(Card("monitors within limits", value, below, "worse" if tripped else ""))
    rate = _recent(run.figures.get("images_per_second"))
    if rate is not None:
        seconds = _recent(run.figures.get("time/step_seconds"))
        found.append(
            Card("images per second", number(rate, ".3g"), "" if seconds is None else f"{seconds:.3g} s per step")
        )
    memory = run.figures.get("memory/allocated_gib_max")
    if memory is not None and memory.last() is not None:
        found.append(Card("peak memory", f"{memory.last():.1f} GiB", "in tensors, of the fullest process"))
    spent = _hours(run.figures.get("time/step_seconds"))
    if spent is not None:
        found.append(Card("time in steps", spent, "evaluations and saves come to it"))
    return found[:8]


def _progress(run: Run) -> list[Card]:
    """The figures of the evaluations that decide, from the first to the last."""
    rows = [row for row in changes(run) if better_when_higher(row.figure) is not None]
    rows = [row for place, row in enumerate(rows) if all(row.means != each.means for each in rows[:place])][:2]
    found = []
    for row in rows:
        spec, tone = spec_for(row.difference), {1: "better", -1: "worse"}.get(row.better or 0, "")
        below = f"{number(row.difference.mean, f'+{spec}')} since step {row.steps[0]}"
        evaluated = run.evaluated(row.figure)
        on = (
            ""
            if evaluated is None
            else f", {counted(row.difference.count, 'item') if not evaluated.on else evaluated.on}"
        )
        found.append(Card(label(row.figure), number(row.means[1], spec), below + on, tone))
    if not rows:
        reward = _recent(run.figures.get("reward/total"))
        if reward is not None:
            found.append(Card("training reward", number(reward), "mean of the latest lines"))
    return found


def _recent(series: Series | None) -> float | None:
    values = [] if series is None else [value for value in series.values if value is not None][-RECENT:]
    return fmean(values) if values else None


def _hours(series: Series | None) -> str | None:
    """The time of all steps: a line stands for those since the line before."""
    if series is None:
        return None
    pairs = zip(series.steps, [0, *series.steps], series.values, strict=False)
    seconds = sum((step - before) * value for step, before, value in pairs if value is not None)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds else ABSENT
