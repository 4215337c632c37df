"""Pictures that `glm-train sample` drew, with `samples.jsonl` beside them: as what a benchmark asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from glm_training.data import DataError
from glm_training.data.pictures.images import decode_image
from glm_training.evaluation.suites.drawing import tiled
from glm_training.evaluation.suites.protocol import EvaluationError, Maker, Picture, Record, Suite
from glm_training.utils.words import counted

SAMPLES = "samples.jsonl"
"""A line per picture: its file, prompt, seed, plan and render, and all else that decided it."""

_NAMED = 5


def read_samples(folder: Path) -> list[Record]:
    """The records of `folder`; a last line that a kill has torn is left out. None there: none.

    Raises EvaluationError, naming the line, for anything else that is no record.
    """
    path = folder / SAMPLES
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines) or line.endswith(b"\n"):
            raise EvaluationError(f"{path}:{number}: is no record of a picture; mend the line, or move the file away")
    return records


def is_record(line: bytes) -> bool:
    """Whether a line is the whole record of a picture."""
    return _record(line) is not None


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("file", "prompt", "group"))
    return record if known else None


def samples_each(folder: Path) -> int:
    """How many pictures each prompt of the folder has at least, whether or not all that are listed are still there."""
    listed: dict[str, set[str]] = {}
    for record in read_samples(folder):
        listed.setdefault(record["prompt"], set()).add(record["file"])
    return min(map(len, listed.values()), default=0)


def taking_samples(folder: Path, suite: Suite) -> tuple[Maker, dict[str, Any]]:
    """Who gives the pictures of `suite` out of a folder of samples, and what decides them: the n-th picture of a prompt
    is the n-th that was drawn of it.

    Raises EvaluationError, naming prompts, where some are missing; the maker, naming all pictures that cannot be read.
    """
    drawn = _by_prompt(folder)
    asked: dict[str, int] = {}
    for picture in suite.pictures():
        asked[picture.prompt] = max(asked.get(picture.prompt, 0), max(picture.samples) + 1)
    settings = _one_setting(folder, asked)
    problems = [
        f"{prompt!r} has {counted(len(drawn.get(prompt, [])), 'picture')}, wanted {count}"
        for prompt, count in asked.items()
        if len(drawn.get(prompt, [])) < count
    ]
    if problems:
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:_NAMED])
        remedy = "Run glm-train sample again, which draws what is missing, or give --samples"
        raise EvaluationError(f"--images {folder} has not all pictures of the benchmark:{listed}{more}\n{remedy}")

    def make(pictures: Sequence[Picture]) -> list[Image.Image]:
        try:
            return [tiled([decode_image(drawn[each.prompt][n]) for n in each.samples]) for each in pictures]
        except DataError as error:
            broken = _broken(path for prompt, count in asked.items() for path in drawn[prompt][:count])
            raise EvaluationError(
                f"--images {folder}: {', '.join(broken)} cannot be read: delete {counted(len(broken), 'file')} and run "
                "glm-train sample again, which draws what is missing"
            ) from error

    contents = hashlib.sha256()
    for path in sorted(path for prompt, paths in drawn.items() if prompt in asked for path in paths):
        contents.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return make, {**settings, "samples of": str(folder.resolve()), "contents": contents.hexdigest()[:16]}


def _broken(paths: Iterable[Path]) -> list[str]:
    found = []
    for path in paths:
        try:
            decode_image(path)
        except DataError:
            found.append(path.name)
    return found


def _one_setting(folder: Path, prompts: Collection[str]) -> dict[str, Any]:
    """What made all pictures of `prompts`, whatever their seeds. Raises EvaluationError where that is not one."""
    of_picture = ("file", "prompt", "source", "index", "plan", "render", "seed", "group")
    records = [record for record in read_samples(folder) if record["prompt"] in prompts]
    found = [{key: value for key, value in record.items() if key not in of_picture} for record in records]
    for record, other in zip(records, found, strict=True):
        names = [key for key in {**found[0], **other} if found[0].get(key) != other.get(key)]
        if names:
            raise EvaluationError(
                f"--images {folder}: {records[0]['file']} and {record['file']} were not made alike ({', '.join(names)} "
                "differ): give each model a folder of its own"
            )
    return found[0] if found else {}


def _by_prompt(folder: Path) -> dict[str, list[Path]]:
    """The pictures that are there, by prompt, in the order in which they are listed."""
    found: dict[str, dict[Path, None]] = {}
    for record in read_samples(folder):
        path = folder / record["file"]
        if path.parent == folder and path.is_file():
            found.setdefault(record["prompt"], {})[path] = None
    return {prompt: list(paths) for prompt, paths in found.items()}
