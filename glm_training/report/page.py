"""The page: everything in one file that asks for nothing from elsewhere, whatever the prompts of a run say.

Texts go through jinja2's escaping or, as JSON, into `textContent`; the page's own policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from glm_training import __version__
from glm_training.reinforcement.plan_share import plan_share_reading
from glm_training.report.charts import Section, sections
from glm_training.report.comparison import Comparison, Row, changes, shown, spec_for
from glm_training.report.monitors import Watched, watched
from glm_training.report.overview import Card, cards, subtitle
from glm_training.report.pictures import Album, prompts_of, rollouts_of, samples_of
from glm_training.report.prompts import prompt_rows
from glm_training.report.run import ReportError, Run, flattened
from glm_training.report.terminal import below, headline, verdict
from glm_training.utils.figure_names import label
from glm_training.utils.kept_rollouts import KeptRollout
from glm_training.utils.redaction import redact
from glm_training.utils.words import number

MARK = '<meta name="generator" content="glm-train report">'
"""What every page of ours has near its start, so that nothing else is written over."""
MAX_RUNS = 8
MAX_TEXT = 1000
"""Characters of a prompt that the page has."""
MAX_NOTES = 200
DIGITS = 7
"""Of a figure: those of fp32."""


def write_page(path: Path, html: str) -> None:
    """Appears whole or not at all. Raises ReportError where it cannot be written, or would replace what is no page of
    ours."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        if path.exists() and MARK.encode() not in path.read_bytes()[:1000]:
            raise ReportError(f"{path} is there and no page of glm-train report: name another file with --out")
        fresh.write_text(html, encoding="utf-8", errors="backslashreplace")
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise ReportError(f"{path} cannot be written: {error.strerror}; name another file with --out") from error


def page(runs: Sequence[Run], comparison: Comparison | None) -> str:
    """The whole page of one run, or of several with their `comparison`. Raises ReportError for too many."""
    if len(runs) > MAX_RUNS:
        raise ReportError(f"a page has room for {MAX_RUNS} runs, and {len(runs)} are named: leave some out")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    album = Album()
    monitors = [watched(run) for run in runs]
    data = {"runs": [run.name for run in runs], **_pictures(runs, album), **_figures(runs, monitors)}
    script = _asset("plot.js") + _asset("page.js")
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        mark=Markup(MARK),
        policy=policy,
        style=Markup(_asset("page.css")),
        script=Markup(script),
        data=Markup(_json(data)),
        pictures=Markup(_json(album.pictures)),
        version=__version__,
        title=" · ".join(run.name for run in runs),
        headline=_lead(runs[0]) if comparison is None else comparison.headline,
        comparison=comparison,
        below=below(runs, monitors, comparison),
        rows=_rows(runs, comparison),
        cards=_cards(runs, monitors),
        subtitles=[subtitle(run) for run in runs],
        monitors=[[_monitor(one) for one in found] for found in monitors],
        sections=data["sections"],
        has={name: any(data[name]) for name in ("samples", "rollouts", "prompts")},
        settings=_settings(runs),
        notes=[_notes(run) for run in runs],
        runs=runs,
        shown=shown,
        max_text=MAX_TEXT,
    )


def _asset(name: str) -> str:
    return (resources.files("glm_training.report") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """As a script element can hold it: no tag can end or begin in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def text(value: str) -> str:
    """A text of the run's data, without secrets, as long as the page has it."""
    kept = redact(value[: MAX_TEXT + 1])
    return kept if len(kept) <= MAX_TEXT else f"{kept[:MAX_TEXT]}…"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _figures(runs: Sequence[Run], monitors: Sequence[Sequence[Watched]]) -> dict[str, Any]:
    """Sections of charts. Lines of a run share their steps, which stand in a table."""
    steps: dict[tuple[int, ...], int] = {}
    found = []
    limits = {(place, one.tag): one for place, own in enumerate(monitors) for one in own}
    for section in sections(runs):
        charts = []
        for chart in section.charts:
            lines = []
            for line in chart.lines:
                place = steps.setdefault(tuple(line.steps), len(steps))
                bands = {
                    name: [_rounded(v) for v in values] for name, values in (("low", line.low), ("high", line.high))
                }
                lines.append(
                    {"run": line.run, "role": line.role, "tag": line.tag, "steps": place, "each": line.each}
                    | {"values": [_rounded(value) for value in line.values]}
                    | {name: values for name, values in bands.items() if values}
                )
            tags = {line.tag for line in chart.lines}
            ends = [
                {"value": _rounded(value), "run": place}
                for (place, tag), one in limits.items()
                if tag in tags
                for value in (one.low, one.high)
                if value is not None
            ]
            charts.append(
                {"key": chart.key, "title": chart.title, "unit": chart.unit, "about": chart.about}
                | {"lines": lines, "limits": ends}
            )
        found.append({"key": section.key, "title": section.title, "about": section.about, "charts": charts}
                     | {"readings": _readings(section, runs)})  # fmt: skip
    return {"sections": found, "steps": [list(each) for each in steps]}


def _readings(section: Section, runs: Sequence[Run]) -> list[str]:
    """What the variance share of each run says, as the run itself tells it."""
    if section.key != "spread":
        return []
    lines = []
    for run in runs:
        series = run.figures.get("reward/plan_variance_share")
        shares = [] if series is None else [value for value in series.values if value is not None]
        if shares:
            who = f"{run.name}: " if len(runs) > 1 else ""
            mean = min(1.0, max(0.0, sum(shares) / len(shares)))
            lines.append(f"{who}{plan_share_reading(mean)} (mean of the run)")
    return lines


def _pictures(runs: Sequence[Run], album: Album) -> dict[str, Any]:
    samples, rollouts, prompts = [], [], []
    for run in runs:
        steps, told = samples_of(run, len(runs), album)
        samples.append({"steps": steps, "told": told, "prompts": [text(each) for each in prompts_of(run.samples)]}
                       if steps else None)  # fmt: skip
        kept, told = rollouts_of(run, len(runs), album)
        rollouts.append({"steps": [_rollout(*each) for each in kept], "told": told} if kept else None)
        rows = prompt_rows(run)
        prompts.append(None if rows is None else rows | {"prompts": [text(each) for each in rows["prompts"]]})
    return {"samples": samples, "rollouts": rollouts, "prompts": prompts}


def _rollout(kept: KeptRollout, pictures: list[int]) -> dict[str, Any]:
    content = asdict(kept) | {"pictures": pictures, "prompts": [text(each) for each in kept.prompts]}
    return content | {"names": {name: label(name) for name in kept.scores}}


def _lead(run: Run) -> str:
    """What a run has come to; its name stands above."""
    line = headline(run).removeprefix(f"{run.name}, ")
    return line[:1].upper() + line[1:]


def _rows(runs: Sequence[Run], comparison: Comparison | None) -> list[dict[str, str]]:
    """The table of the overview: first against last of one run, or one run against the other."""
    rows = changes(runs[0]) if comparison is None else comparison.rows
    return [_row(row, None if comparison is None else comparison.names) for row in rows]


def _row(row: Row, names: Sequence[str] | None) -> dict[str, str]:
    spec, found = spec_for(row.difference), row.difference
    between = ""
    if found.low is not None and found.high is not None:
        between = f"{number(found.low, f'+{spec}')} to {number(found.high, f'+{spec}')}"
    tone = {1: "better", -1: "worse"}.get(row.better or 0, "") if names is None else ""
    return {
        "figure": label(row.figure),
        "first": number(row.means[0], spec),
        "second": number(row.means[1], spec),
        "difference": number(found.mean, f"+{spec}"),
        "interval": between,
        "count": str(found.count),
        "verdict": verdict(row, names),
        "tone": tone,
    }


def _cards(runs: Sequence[Run], monitors: Sequence[Sequence[Watched]]) -> dict[str, list[Card | None]]:
    """Title -> the card of each run; None where it has none."""
    found = [{card.title: card for card in cards(*each)} for each in zip(runs, monitors, strict=True)]
    titles = dict.fromkeys(title for each in found for title in each)
    return {title: [each.get(title) for each in found] for title in titles}


def _monitor(one: Watched) -> dict[str, Any]:
    state = "over its limit" if one.used > 1 else "more than half" if one.used > 0.5 else "within"
    ends = [number(value, ".3g") for value in (one.low, one.high)]
    allowed = (
        f"at most {ends[1]}" if one.low is None else f"at least {ends[0]}" if one.high is None else " to ".join(ends)
    )
    used = "more than 10 x" if one.used > 10 else f"{one.used:.0%}"
    return asdict(one) | {
        "state": state,
        "allowed": allowed,
        "share": min(100, round(100 * one.used)) if math.isfinite(one.used) else 100,
        "used": used,
        "start": number(one.start, ".3g"),
        "now": number(one.now, ".3g"),
    }


def _settings(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Section -> key -> its value in each run."""
    flat = [flattened(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    found: dict[str, dict[str, list[str]]] = {}
    for key in keys:
        section = key.split(".")[0] if "." in key else "run"
        values = [text(shown(each[key])) if key in each else "" for each in flat]
        found.setdefault(section, {})[key] = values
    return found


def _notes(run: Run) -> dict[str, Any]:
    """The newest lines of the log, each once; warnings before all others."""
    once = list({(note.warning, note.text): note for note in run.notes}.values())
    kept = [note for note in once if note.warning][-MAX_NOTES:]
    kept += [note for note in once if not note.warning][-MAX_NOTES:]
    return {"lines": kept, "left_out": len(once) - len(kept)}
