"""Where the monitored figures of a run stand within their limits, told again from its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from glm_training.config.sections.monitors import MonitorsConfig
from glm_training.reinforcement.monitors.limits import METRIC, Limit, limits_of
from glm_training.report.run import Run

AT_EVALUATIONS = ("picture_change", "source_similarity")


@dataclass(frozen=True)
class Watched:
    """A figure that has a limit. `start`, `now`: means over the monitor's window. `used`: how much of the limit, 1 is
    all of it. `low`, `high`: what it may be, None without an end. `tripped`: what the run said of it."""

    name: str
    tag: str
    key: str
    start: float
    now: float
    used: float
    low: float | None
    high: float | None
    tripped: list[str]


def watched(run: Run) -> list[Watched]:
    """The monitors of the run that have a limit and something to compare. Each logged line counts as the steps that it
    is the mean of, so where `logging.log_interval` is large the figures are a little coarser than the run's own."""
    settings = run.setting("reward.monitors")
    if not isinstance(settings, dict) or not any(tag.startswith("monitor/") for tag in run.figures):
        return []
    known = {key: value for key, value in settings.items() if key in MonitorsConfig.model_fields}
    try:
        config = MonitorsConfig.model_validate(known)
    except ValueError:
        problem = "reward.monitors of config.yaml could not be read: limits are not shown"
        run.problems += [] if problem in run.problems else [problem]
        return []
    interval = run.setting("logging.log_interval")
    lines = max(1, round(config.window / interval)) if isinstance(interval, int) and interval > 0 else config.window
    found = []
    for name, limit in limits_of(config).items():
        for tag in _tags(name, config):
            window = 1 if tag.startswith("eval/") or name in AT_EVALUATIONS else lines
            one = _watched(run, tag, limit, window)
            if one is not None:
                found.append(one)
    return found


def _tags(name: str, config: MonitorsConfig) -> list[str]:
    if name == METRIC:
        return [f"eval/{metric}" for metric in config.metrics]
    return [f"{name.removesuffix('_kl')}/kl"] if name.endswith("_kl") else [f"monitor/{name}"]


def _watched(run: Run, tag: str, limit: Limit, window: int) -> Watched | None:
    series = run.figures.get(tag)
    values = [] if series is None else [value for value in series.values if value is not None]
    if not values or (len(values) <= window and not limit.absolute):
        return None
    start, now = fmean(values[:window]), fmean(values[-window:])
    label = tag.removeprefix("monitor/").removeprefix("eval/") if not tag.endswith("/kl") else tag.replace("/", "_")
    said = [note.text for note in run.notes if note.warning and note.text.startswith(f"monitor {label}")]
    low, high = limit.bounds(start)
    share = max(0.0, limit.used(start, now) / limit.limit) if limit.limit else float(limit.used(start, now) > 0)
    name = label.replace("_", " ")
    return Watched(name, tag, f"reward.monitors.{limit.key}", start, now, share, low, high, said)


def worst(found: Sequence[Watched]) -> Any:
    """The one that has used most of its limit; None of none."""
    return max(found, key=lambda one: one.used, default=None)
