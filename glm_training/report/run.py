"""What lies in the folder of a run, as plain data: figures, evaluations, pictures, settings, notes.

Everything is reached from the folder itself, so that it may have been moved or copied, and nothing has to be there: a
run may still be going, have been stopped, or be older than what is looked for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glm_training.checkpoint.run_record import RunRecord
from glm_training.utils.folder_lock import in_use
from glm_training.utils.metrics_file import EVALUATIONS, METRICS, RESERVED, SESSIONS
from glm_training.utils.prompt_lines import PROMPTS, read_prompts
from glm_training.utils.step_folders import step_folders
from glm_training.utils.step_lines import records_of
from glm_training.utils.writable import nearest_place

CONFIG, LOG, PAGE = "config.yaml", "train.log", "report.html"
LOG_BYTES = 4 << 20
"""So much of the end of `train.log` is read."""

_LOGGED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: (.*)")


class ReportError(Exception):
    """What is named as a run is none, or the page cannot be written; the message says what to do."""


@dataclass(frozen=True)
class Series:
    """A figure over the run. values: None where it was not finite."""

    steps: list[int]
    values: list[float | None]

    def last(self) -> float | None:
        """The last finite value."""
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one kind of thing (`on`: "held-out prompts"), with a digest of all of them, empty in older
    runs. scores: figure -> a value for each of `prompts`, None where it does not apply."""

    step: int
    on: str
    digest: str
    prompts: list[str]
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class Sampled:
    """The pictures of the first evaluation prompts after `step` steps, in their order."""

    step: int
    files: list[Path]
    prompts: list[str]


@dataclass(frozen=True)
class Note:
    """A line of `train.log`."""

    time: str
    warning: bool
    text: str


@dataclass
class Run:
    """A run's folder, read. `config`: nested as in its file; `derived`: what it comes to, a line each. `problems`: what
    was there and could not be read."""

    folder: Path
    name: str
    record: RunRecord | None = None
    going: bool = False
    figures: dict[str, Series] = field(default_factory=dict)
    evaluations: list[Evaluated] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)
    samples: list[Sampled] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that the log has."""
        return max((series.steps[-1] for series in self.figures.values()), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, as its newest session was told, or those that it has where it was told fewer; None
        where that is not known."""
        known = [session.get("total_steps") for session in self.sessions] or [self.setting("training.max_steps")]
        return max(known[-1], self.step) if isinstance(known[-1], int) else None

    @property
    def state(self) -> str:
        """What became of it, in a word or two."""
        if self.going:
            return "running"
        total = self.total_steps
        if total is None:
            return "ended"
        return "finished" if self.step >= total else "stopped"

    def setting(self, key: str) -> Any:
        """The value of `section.key`; None where the run has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def evaluated(self, figure: str, step: int | None = None) -> Evaluated | None:
        """The last evaluation that has the figure, or the one after `step` steps."""
        found = [one for one in self.evaluations if figure in one.scores and step in (None, one.step)]
        return found[-1] if found else None


def read_runs(folders: Sequence[str | Path], *, ended: bool = False) -> list[Run]:
    """The runs in `folders`, with names that tell them apart; `ended`: whoever holds them has trained. Raises
    ReportError with every folder that is none."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ReportError as error:
            problems.append(str(error))
    if problems:
        raise ReportError("\n".join(problems))
    for run, name in zip(runs, _names([run.folder for run in runs]), strict=True):
        run.name = name
        run.going = run.going and not ended
    return runs


def read_run(folder: str | Path) -> Run:
    """Raises ReportError where `folder` holds no run."""
    path = Path(folder).expanduser()
    if not any((path / name).is_file() for name in (METRICS, EVALUATIONS, CONFIG)):
        inside = next((up for up in path.absolute().parents if (up / METRICS).is_file()), None)
        hint = f"the run is {inside}" if inside is not None else f"a run's folder has {METRICS} and {CONFIG}"
        if (path / "results.json").is_file():
            hint = "it is what glm-train evaluate wrote, and its figures are in results.json"
        there, near = ("holds no run", None) if path.is_dir() else ("is no folder", nearest_place(path, "runs"))
        raise ReportError(
            f"{folder} {there}: {hint}"
            + (f"; did you mean {near}?" if near is not None and (near / METRICS).is_file() else "")
        )
    run = Run(path, path.resolve().name or "run", RunRecord.read(path), in_use(path))
    run.figures = _figures(_records(run, METRICS))
    run.evaluations = [one for record in _records(run, EVALUATIONS) if (one := _evaluated(record)) is not None]
    run.sessions = _records(run, SESSIONS)
    run.config, run.derived = _settings(run)
    run.notes = _notes(run)
    run.samples = _samples(run)
    return run


def _records(run: Run, name: str) -> list[dict[str, Any]]:
    try:
        return [record for record in records_of(run.folder / name) if _is_step(record["step"])]
    except OSError as error:
        run.problems.append(f"{name} could not be read: {error.strerror}")
        return []


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> float | None:
    """A figure; None for what is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= 1e300 else None  # NaN too, and what no axis can have


def _figures(records: list[dict[str, Any]]) -> dict[str, Series]:
    """Every tag with its steps in order; where a step has two lines with it the later one counts."""
    found: dict[str, dict[int, float | None]] = {}
    for record in records:
        step = int(record["step"])
        for tag, value in record.items():
            if tag not in RESERVED and (value is None or isinstance(value, int | float)):
                found.setdefault(tag, {})[step] = _number(value)
    return {tag: Series(sorted(values), [values[step] for step in sorted(values)]) for tag, values in found.items()}


def _evaluated(record: dict[str, Any]) -> Evaluated | None:
    """None for a line that is none of ours."""
    prompts, scores = record.get("prompts"), record.get("scores")
    if not isinstance(prompts, list) or not isinstance(scores, dict):
        return None
    kept = {
        str(name): [_number(value) for value in values]
        for name, values in scores.items()
        if isinstance(values, list) and len(values) == len(prompts)
    }
    on, digest = str(record.get("on", "prompts")), str(record.get("digest", ""))
    return Evaluated(int(record["step"]), on, digest, [str(each) for each in prompts], kept)


def _settings(run: Run) -> tuple[dict[str, Any], list[str]]:
    path = run.folder / CONFIG
    if not path.is_file():
        return {}, []
    try:
        text = path.read_text(encoding="utf-8")
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        tree = yaml.load(text, Loader=loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        run.problems.append(f"{CONFIG} could not be read: {str(error).splitlines()[0]}")
        return {}, []
    derived = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")][1:]
    return (tree, derived) if isinstance(tree, dict) else ({}, [])


def _notes(run: Run) -> list[Note]:
    """What the run told besides its figures, without where it saved."""
    path = run.folder / LOG
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        run.problems.append(f"{LOG} could not be read: {error.strerror}")
        return []
    notes = []
    for line in text.splitlines():
        match = _LOGGED.match(line)
        if match is not None and not match[3].startswith("saved "):
            warning = match[2] not in ("DEBUG", "INFO") or match[3].startswith("warning: ")
            notes.append(Note(match[1], warning, match[3].removeprefix("warning: ")))
    return notes


def _samples(run: Run) -> list[Sampled]:
    """Those up to the last logged step: later ones are of a stretch that is done again."""
    named = next((one.prompts for one in run.evaluations if one.on.endswith("prompts")), [])
    found = []
    for step, folder in step_folders(run.folder / "samples"):
        numbered = [(int(path.stem), path) for path in folder.glob("*.png") if path.stem.isdecimal()]
        files = [path for _, path in sorted(numbered)]
        if not files or (run.figures and step > run.step):
            continue
        prompts = named[: len(files)]
        if len(prompts) < len(files) and (folder / PROMPTS).is_file():
            prompts = read_prompts(folder)
        prompts = (prompts + [""] * len(files))[: len(files)]
        found.append(Sampled(step, files, prompts))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart; of one that is named again its place too."""
    paths = [folder.resolve() for folder in folders]
    names: dict[Path, str] = {}
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = {path: "/".join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(names):
            break
    often = Counter(paths)
    return [names[path] + (f" ({place})" if often[path] > 1 else "") for place, path in enumerate(paths, 1)]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as `section.key` -> value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
