"""Files of JSON lines with a `step` each: appended to whole line by whole line, and cut back by a run that resumes to
where it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm_training.utils.failures import beside_training


class StepLines:
    """Appends lines to a file, never half a one.

    Lines that the disk does not take wait in memory, and are written before the next one once it does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._torn_at: int | None = None  # where the file is to be cut before it is written to again

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, which JSON must be able to say. Raises no error of the disk: it is told once."""
        # backslashreplace: half of a surrogate pair, as in odd file names, becomes the escape that JSON has for it
        text = json.dumps(record, allow_nan=False, ensure_ascii=False)
        self._waiting.append(text.encode("utf-8", "backslashreplace"))
        self.write_waiting()

    def write_waiting(self) -> int:
        """Tries to write what waits; how many lines still do."""
        if self._waiting:
            with beside_training(f"writing {self.path.name}", "its lines wait until they can be written"):
                self._write(b"".join(line + b"\n" for line in self._waiting))
                self._waiting.clear()
        return len(self._waiting)

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Opened each time: a handle to a network disk that was away stays broken, and some tell of a full disk only
            # when a file is closed.
            with self.path.open("ab", buffering=0) as file:
                self._cut()
                self._torn_at = file.seek(0, os.SEEK_END)
                while data:
                    data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):  # the caller tells; what could not be cut now is cut before the next line
                self._cut()
            raise
        self._torn_at = None

    def _cut(self) -> None:
        """Takes away what a failed write has left."""
        if self._torn_at is not None and self.path.stat().st_size > self._torn_at:
            os.truncate(self.path, self._torn_at)


def line_of(path: Path, step: int, *, prefix: str = "") -> dict[str, Any] | None:
    """The last whole line of `step` with a key that starts with `prefix`; None without one."""
    found = [line for line in lines_of(path) if line["step"] == step and any(key.startswith(prefix) for key in line)]
    return found[-1] if found else None


def lines_of(path: Path) -> list[dict[str, Any]]:
    """`records_of`; none of a file that cannot be read, as what it has is made again."""
    try:
        return records_of(path)
    except OSError:
        return []


def records_of(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none of a file that is not there. A line that is none, or only half written, is passed over.
    Raises OSError."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [record for line in lines if (record := _record(line)) is not None]


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
    with fresh.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())  # or a power failure may leave the new name with nothing in it
    os.replace(fresh, path)


def _record(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line that has a number as its step; None for anything else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):  # the latter of brackets in brackets
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int | float) else None
