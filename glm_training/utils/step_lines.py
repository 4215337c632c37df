"""Files of JSON lines with a `step` each, which a run that resumes cuts back to where it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path


def step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill or a full disk has torn."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf


def has_step(path: Path, step: int) -> bool:
    """Whether the file has a line of `step`."""
    return path.is_file() and any(step_of(line) == step for line in path.read_text(encoding="utf-8").splitlines(True))


def keep_until(path: Path, step: int) -> None:
    """Leaves the lines up to `step`; the others move to a file beside it, `<name>.discarded<suffix>`."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    dropped = [line for line in lines if step_of(line) > step]
    if dropped:
        with path.with_name(f"{path.stem}.discarded{path.suffix}").open("a", encoding="utf-8") as file:
            file.writelines(line if line.endswith("\n") else line + "\n" for line in dropped)
        path.write_text("".join(line for line in lines if step_of(line) <= step), encoding="utf-8")
