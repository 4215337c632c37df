"""A bounded number of files open for reading at offsets, by many threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from glm_training.data.captioned.layouts.tars.index import stamp_of
from glm_training.data.captioned.layouts.tars.members import FileReader
from glm_training.data.problems import DataError, Problem

LIMIT = 256
"""Files open at once: below what systems allow a process (1024, often), with room for the others."""


@dataclass
class _Open:
    file: BufferedReader
    reader: FileReader
    users: int = 0


class OpenFiles:
    """The most recently read files stay open, at most `limit` of those that nobody is reading."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Open] = OrderedDict()

    @contextmanager
    def reading(self, path: Path, stamp: tuple[int, int]) -> Iterator[FileReader]:
        """Inside, the file at `path` is open. Raises DataError where it is another one than that of `stamp`, or is so
        by the end: what was read inside is of no use then."""
        with self._lock:
            opened = self._open.get(path) or self._opened(path, stamp)
            opened.users += 1
            self._open.move_to_end(path)
        try:
            yield opened.reader
            _check(path, opened.file, stamp)
        finally:
            with self._lock:
                opened.users -= 1
                self._close_beyond(self._limit)

    def close(self) -> None:
        """Closes what nobody is reading; later reads open it again."""
        with self._lock:
            self._close_beyond(0)

    def _opened(self, path: Path, stamp: tuple[int, int]) -> _Open:
        try:
            file = path.open("rb")
        except OSError as error:
            problem = Problem(path, f"cannot be read: {error.strerror}", "Put it back and resume")
            raise DataError([problem]) from error
        try:
            _check(path, file, stamp)
        except DataError:
            file.close()
            raise
        self._open[path] = _Open(file, FileReader(file))
        return self._open[path]

    def _close_beyond(self, limit: int) -> None:
        idle = [path for path, opened in self._open.items() if opened.users == 0]
        for path in idle[: max(len(self._open) - limit, 0)]:
            self._open.pop(path).file.close()


def _check(path: Path, file: BufferedReader, stamp: tuple[int, int]) -> None:
    if stamp_of(os.fstat(file.fileno())) != stamp:
        raise DataError([Problem(path, "changed since the run began", "Put the old one back, or start it again")])
