"""The samples that a run left out, in a file: which, where they are, and why."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from glm_training.data.captioned.samples import Fault
from glm_training.data.problems import DataError
from glm_training.utils.failures import beside_training
from glm_training.utils.words import counted

NAME = "skipped_samples"


class SkippedSamples:
    """Counts broken and unsuitable samples, each once, and writes a line of JSON for each to
    ``<folder>/skipped_samples.jsonl`` (of process 3, say, ``skipped_samples-3.jsonl``) from the first batch on.

    A run that resumes, on however many processes, goes on from what the files say: the count of broken ones, too. A
    sample that is written already is not written again.

    Args:
        folder: of the files; None writes none.
        total: samples of the data, those left out included.
        max_bad_fraction: share of them that may be broken.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, total: int, max_bad_fraction: float, rank: int = 0) -> None:
        self._folder = folder
        self._file = None if folder is None else folder / (f"{NAME}-{rank}.jsonl" if rank else f"{NAME}.jsonl")
        self._total = total
        self._limit = max_bad_fraction * total
        self._fraction = max_bad_fraction
        self._rank = rank
        self._lock = threading.Lock()
        self._broken: dict[tuple[str, str], Fault] = {}
        self._unsuitable: set[tuple[str, str]] = set()
        self._written: set[tuple[str, str]] | None = None  # None until the run has begun

    def counts(self) -> tuple[int, int]:
        """How many are broken, and how many unsuitable, as far as is known here."""
        return len(self._broken), len(self._unsuitable)

    def add(self, fault: Fault, *, unsuitable: bool = False) -> None:
        """Takes note of a sample; raises DataError where more are broken than may be."""
        self.note([fault], unsuitable=unsuitable)
        self.check()

    def note(self, faults: Iterable[Fault], *, unsuitable: bool = False) -> None:
        """Takes note of samples, and leaves it to :meth:`check` to judge."""
        with self._lock:
            for fault in faults:
                key = (str(fault.path), fault.key)
                if unsuitable:
                    self._unsuitable.add(key)
                else:
                    self._broken.setdefault(key, fault)
                if self._written is not None:
                    self._write(key, fault, "unsuitable" if unsuitable else "broken")

    def too_many(self) -> bool:
        """Whether more samples are broken than may be."""
        return len(self._broken) > self._limit

    def check(self) -> None:
        """Raises DataError where more samples are broken than may be."""
        with self._lock:
            faults = list(self._broken.values()) if self.too_many() else []
        if faults:
            raise DataError([fault.problem() for fault in faults], self._heading(len(faults)))

    def begin(self, found: Sequence[Fault], unsuitable: Sequence[Fault] = ()) -> None:
        """The run has begun: what was `found` broken or `unsuitable` before is written, by the main process, unless an
        earlier part of the run has done so; what comes is written from here on."""
        with self._lock:
            if self._written is not None:
                return
            self._written = set()
            if self._folder is not None:
                with beside_training(f"reading {NAME}.jsonl"):
                    self._read()
            for kind, faults in (("broken", found), ("unsuitable", unsuitable)):
                for fault in faults if self._rank == 0 else ():
                    self._write((str(fault.path), fault.key), fault, kind)

    def _read(self) -> None:
        assert self._folder is not None and self._written is not None
        for file in sorted(self._folder.glob(f"{NAME}*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    fault = Fault(Path(record["file"]), record["key"], record["reason"], record["remedy"])
                    kind = record["kind"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill has torn
                key = (record["file"], fault.key)
                self._written.add(key)
                if kind == "broken":
                    self._broken.setdefault(key, fault)
                else:
                    self._unsuitable.add(key)

    def _write(self, key: tuple[str, str], fault: Fault, kind: str) -> None:
        """Appends a whole line. What another process has written meanwhile may come a second time, in its own file."""
        assert self._written is not None
        if self._file is None or key in self._written:
            return
        self._written.add(key)
        record = {"kind": kind, "file": key[0], "key": fault.key, "reason": fault.reason, "remedy": fault.remedy}
        with beside_training(f"writing {self._file.name}"):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab", buffering=0) as file:
                torn = file.tell() > 0 and not _ends_a_line(self._file)
                line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
                file.write(b"\n" * torn + line + b"\n")

    def _heading(self, count: int) -> str:
        heading = f"{count} of {counted(self._total, 'sample')} cannot be used"
        return f"{heading} (data.max_bad_fraction {self._fraction:g}):" if self._fraction else f"{heading}:"


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
