"""Files of JSON lines with a `step` each, which a run that resumes cuts back to where it goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def has_step(path: Path, step: int, *, prefix: str = "") -> bool:
    """Whether the file has a whole line of `step`, with a key that starts with `prefix`."""
    if not path.is_file():
        return False
    records = (_record(line) for line in path.read_bytes().splitlines(keepends=True))
    return any(
        record is not None and record["step"] == step and any(key.startswith(prefix) for key in record)
        for record in records
    )


def keep_until(path: Path, step: int, *, but_with: str | None = None) -> None:
    """Leaves the lines up to `step`, but of `step` itself none that has the key `but_with`; the others, and one that a
    kill has torn, move to a file beside it, `<name>.discarded<suffix>`."""
    if not path.is_file():
        return
    kept: list[bytes] = []
    later: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _record(line)
        keep = record is not None and record["step"] <= step and not (record["step"] == step and but_with in record)
        (kept if keep else later).append(line)
    if not later:
        return
    with path.with_name(f"{path.stem}.discarded{path.suffix}").open("ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in later)
        file.flush()
        os.fsync(file.fileno())
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(b"".join(kept))
    os.replace(fresh, path)


def _record(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line that has a number as its step; None for anything else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int | float) else None
