"""Which figures of a run are drawn together, under which heading, and what each of them is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from glm_training.report.comparison import PARTS
from glm_training.report.run import Run
from glm_training.utils.figure_names import RIGHT, label
from glm_training.utils.statistics import estimate

PART_NAMES = {"ar": "AR", "dit": "DiT", "unet": "UNet"}
MAX_POINTS = 2000
"""Of a line; more are brought together in means of neighbours."""
TRAINING, HELD_OUT = "training", "held-out"

Values = list[float | None]


@dataclass(frozen=True)
class Line:
    """A figure of the run at place `run`. `role`: what it is beside the others of its chart. low, high: the interval
    of the mean over prompts at each step, empty without. `each`: logged lines that a point is the mean of."""

    run: int
    role: str
    tag: str
    steps: list[int]
    values: Values
    low: Values = field(default_factory=list)
    high: Values = field(default_factory=list)
    each: int = 1


@dataclass
class Chart:
    """`limits`: horizontal lines with what they are called."""

    key: str
    title: str
    unit: str = ""
    about: str = ""
    lines: list[Line] = field(default_factory=list)
    limits: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Section:
    """`about`: what it shows; `readings`: what it says in this case, a line each."""

    key: str
    title: str
    about: str = ""
    charts: list[Chart] = field(default_factory=list)
    readings: list[str] = field(default_factory=list)


SECTIONS = {
    "rewards": ("Rewards", "Raw scores of the training samples, and of held-out prompts with the 95 % interval of "
                "their mean."),
    "losses": ("Losses", "Of the updates and, at noise that never changes, of what is held out."),
    "gap": ("Training against held-out", "Read the change, not the gap: training draws its samples otherwise than an "
            "evaluation does. A change that rises is learned by heart."),
    "spread": ("Where the reward comes from", "What groups have to learn from: the spread of rewards within a prompt, "
               "and which half makes it."),
    "kl": ("KL and entropy", "How far the policy has moved from its reference, and how sure it has become."),
    "clip": ("Clipping, ratios and the gate", "How far an update moves the policy from the one that drew, and whether "
             "the replay is the rollout."),
    "optimizer": ("Gradients and learning rate", "Gradient norms are those before clipping."),
    "monitors": ("Monitors", "Figures that are never trained on, with their limits. A reward that rises while these "
                 "move is bought elsewhere."),
    "speed": ("Speed and memory", "Over all processes; of memory the process with the most of it."),
    "other": ("Other figures", ""),
}  # fmt: skip
"""Key -> title and what it shows, in the order of the page."""

_SPREAD = {
    "reward/plan_variance_share": ("the plan's share of the spread", "", "1: all of it comes from the plan (AR), 0: "
                                   "from the render (DiT)."),
    "reward/group_std": ("spread within a prompt", "", "Standard deviation of the rewards of one prompt's samples."),
    "reward/zero_spread_groups": ("groups without spread", "prompts", "All rewards are equal: nothing is learned."),
    "reward/skipped_samples": ("samples without a score", "samples", ""),
    "reward/resampled_groups": ("groups drawn anew", "prompts", ""),
    "reward/total_before_resampling": ("reward before resampling", "", ""),
}  # fmt: skip
_LAST = {
    "kl": ("kl", "KL to the reference", ""),
    "clip_fraction": ("clip", "share that is clipped", ""),
    "approx_kl": ("kl", "KL to the policy that drew", ""),
    "ratio_deviation_max": ("clip", "largest |ratio - 1|", ""),
    "grad_norm": ("optimizer", "gradient norm", ""),
    "supervised_grad_norm": ("optimizer", "gradient norm, supervised", ""),
    "learning_rate": ("optimizer", "learning rate", ""),
    "found_rate": ("optimizer", "learning rate found", ""),
    "loss_scale": ("optimizer", "loss scale", ""),
    "skipped_updates": ("optimizer", "updates skipped", ""),
    "psnr": ("losses", "PSNR", "dB"),
    "psnr_over_flat": ("losses", "PSNR over that of the mean colour", "dB"),
    "accuracy": ("losses", "preference accuracy", ""),
    "margin": ("losses", "preference margin", ""),
}
"""Last part of a trained part's figure -> section, title, unit."""
_UNITS = {"ar/kl": "nats per token", "ar/drawn_entropy": "nats", "ar/reference_entropy": "nats"}


def sections(runs: Sequence[Run]) -> list[Section]:
    """All figures of all runs, each in one chart; sections and charts without any are left out."""
    made = {key: Section(key, title, about) for key, (title, about) in SECTIONS.items()}
    charts: dict[tuple[str, str], Chart] = {}
    for place, run in enumerate(runs):
        for tag in run.figures:
            section, chart, role = placed(tag)
            mine = charts.setdefault((section, chart.key), chart)
            if mine is chart:
                made[section].charts.append(chart)
            mine.lines.append(_line(run, place, tag, role))
    for each in made.values():
        each.charts.sort(key=_order)
        for chart in each.charts:
            chart.lines.sort(key=lambda line: (line.run, line.role != TRAINING))
    return [each for each in made.values() if each.charts]


def placed(tag: str) -> tuple[str, Chart, str]:
    """The section of a figure, its chart, and what it is there."""
    head, _, rest = tag.partition("/")
    if tag in _SPREAD:
        return "spread", Chart(tag, *_SPREAD[tag]), TRAINING
    if head in ("reward", "eval") and rest.split("/")[0] not in PARTS:
        about = "Share of pictures to which every metric that counts gives 1." if rest == RIGHT else ""
        return "rewards", Chart(rest, label(rest), "", about), TRAINING if head == "reward" else HELD_OUT
    if head in ("gap", "gap_change"):
        title = f"{'change of the gap' if head == 'gap_change' else 'gap'}, {label(rest)}"
        return "gap", Chart(tag, title), TRAINING
    if head == "monitor":
        return "monitors", Chart(tag, rest.replace("_", " ")), TRAINING
    if head == "gate":
        return "clip", Chart(tag, f"gate, {rest.replace('_', ' ')}"), TRAINING
    if head == "time" and rest != "step_seconds":
        return (
            "speed",
            Chart("time", "seconds of a step, by phase", "s"),
            rest.removesuffix("_seconds").replace("_", " "),
        )
    if head == "memory":
        return "speed", Chart("memory", "memory of the device, peak", "GiB"), rest.removesuffix("_gib_max")
    if tag == "time/step_seconds":
        return "speed", Chart(tag, "seconds of a step", "s"), TRAINING
    if tag.endswith("_per_second"):
        unit = tag.removesuffix("_per_second")
        return "speed", Chart(tag, f"{unit} per second", f"{unit}/s"), TRAINING
    own = tag.removeprefix("eval/")
    if own.split("/")[0] in (*PARTS, "guidance", "discriminator"):
        return _of_part(own, HELD_OUT if head == "eval" else TRAINING)
    return "other", Chart(tag, tag.replace("_", " ")), TRAINING


def _of_part(tag: str, role: str) -> tuple[str, Chart, str]:
    """A figure of a trained part."""
    part, _, rest = tag.partition("/")
    section, title, unit = _LAST.get(rest, ("", rest.replace("_", " ").replace("/", " "), ""))
    if not section:
        section = "kl" if re.search(r"\bkl|entropy", rest) else "clip" if "ratio" in rest else "losses"
    return section, Chart(tag, f"{PART_NAMES.get(part, part)}: {title}", _UNITS.get(tag, unit)), role


def _order(chart: Chart) -> tuple[int, int, str]:
    first = {"total": 0, RIGHT: 1, "time/step_seconds": 0, "images_per_second": 0}
    return first.get(chart.key, 2), chart.key.count("/"), chart.key


def _line(run: Run, place: int, tag: str, role: str) -> Line:
    series = run.figures[tag]
    low: Values = []
    high: Values = []
    if tag.startswith("eval/"):
        found = {one.step: one.scores[tag[5:]] for one in run.evaluations if tag[5:] in one.scores}
        bands = [estimate([value for value in found.get(step, []) if value is not None]) for step in series.steps]
        if any(band is not None and band.low is not None for band in bands):
            low = [None if band is None else band.low for band in bands]
            high = [None if band is None else band.high for band in bands]
    each = -(-len(series.steps) // MAX_POINTS)
    steps = series.steps[each - 1 :: each]
    if len(series.steps) % each:
        steps = [*steps, series.steps[-1]]
    values, low, high = (brought_together(column, each) for column in (series.values, low, high))
    return Line(place, role, tag, steps, values, low, high, each)


def brought_together(values: Sequence[float | None], each: int) -> Values:
    """Means of `each` neighbours, None where none of them is finite."""
    if each == 1:
        return list(values)
    groups = [[v for v in values[i : i + each] if v is not None] for i in range(0, len(values), each)]
    return [fmean(group) if group else None for group in groups]
