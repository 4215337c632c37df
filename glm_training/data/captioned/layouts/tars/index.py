"""Where the samples of a tar lie, found once in a pass over its headers and kept in a small file.

A sample is what webdataset takes for one: members whose paths agree up to the first dot of their names. Its picture is
the member ending in jpg, jpeg, png, webp, gif, bmp, tif or tiff; its caption `txt`, or in `json`; `cls` and others
are not looked at. Of an edit `source.jpg` is what was edited, `target.jpg` or `edited_image.jpg` the picture: names of
columns, as tables have them, before the ending.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from glm_training.data.captioned.layouts.tables.columns import CAPTIONS, EDITED, SOURCES, plain
from glm_training.data.captioned.layouts.tars.members import BLOCK, FileReader, Member, TarWalk
from glm_training.utils.failures import beside_training

FORMAT = 3
IMAGE_NAMES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXT_NAMES = ("txt", "text", "caption")
_PARTS = ("image", "text", "json", "source")
ROW = np.dtype([(f"{name}{part}", "<u4") for name in _PARTS for part in ("", "_size")])
"""32 bytes of a sample: where each of its members begins, in blocks of 512 bytes, and its bytes; 0 = it has none. A tar
may so have 2 TiB, and a member 4 GiB."""

SHOWN_MEMBERS = 5
TOLD_EVERY = 10.0
"""Seconds."""


@dataclass
class TarIndex:
    """What was found in one tar.

    ``rows``: of type ROW, in the order of the pictures. ``faults``: (what, reason) of samples and bytes that cannot be
    used. ``digest``: SHA-256 (hex), see :class:`TarWalk`. ``stamp``: the file's size and time when it was read.
    ``first``: names of its first members. ``repeated``: names that several of its samples have.
    """

    path: Path
    stamp: tuple[int, int]
    digest: str
    rows: np.ndarray
    faults: list[tuple[str, str]] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    repeated: frozenset[str] = frozenset()


def sample_key(name: str, offset: int, repeated: frozenset[str]) -> str:
    """What a sample is called: its `name`, with an `offset` of it in the tar where several have that name, since
    samples are counted by what they are called."""
    return f"{name} (byte {offset})" if name in repeated else name


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    """By which a changed file is noticed: its size and the time of its last change."""
    return status.st_size, status.st_mtime_ns


def sample_name(member: str) -> tuple[str, str]:
    """The sample that a member belongs to, and what the member is of it: `a/b.c.jpg` is the `c.jpg` of `a/b`."""
    folder, slash, name = member.rpartition("/")
    key, _, kind = name.partition(".")
    return folder + slash + key, kind.lower()


def _role(kind: str) -> str:
    """What a member of this kind is to its sample, where that has a name of its own; else the kind."""
    name, dot, ending = kind.rpartition(".")
    if ending in IMAGE_NAMES:
        if not dot or plain(name) in (*EDITED, "image"):
            return "image"
        return "source" if plain(name) in SOURCES else kind
    return "text" if ending in _TEXT_NAMES and (not dot or plain(name) in CAPTIONS) else kind


def index_tar(path: Path) -> TarIndex:
    """Reads the headers of the tar at `path`. Raises OSError."""
    with path.open("rb") as file:
        stamp = stamp_of(os.fstat(file.fileno()))
        reader = FileReader(file)
        walk = TarWalk(reader)
        found = _Samples()
        for member in walk:
            found.add(member)
        faults, repeated = walk.faults + found.faults(), found.repeated()
        return TarIndex(path, stamp, walk.digest, found.rows(), faults, found.first, repeated)


class _Samples:
    """Members, gathered into samples."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self._samples: list[tuple[str, dict[str, Member]]] = []
        self._open: dict[str, dict[str, Member]] = {}

    def add(self, member: Member) -> None:
        if len(self.first) < SHOWN_MEMBERS:
            self.first.append(member.name)
        key, kind = sample_name(member.name)
        if key.rpartition("/")[2] == "":  # hidden files: `._x.jpg` is what a Mac leaves beside `x.jpg`
            return
        ending, kind = kind, _role(kind)
        sample = self._open.get(key)
        if sample is not None and (other := sample.get(kind)) is not None:
            there = sample_name(other.name)[1]
            if there != ending and (kind == "text" or "." in there + ending):
                sample[kind] = min(other, member, key=_rank)  # of a `.txt` and a `.caption` the one counts
                return
        if sample is None or kind in sample:  # the same name again is another sample
            sample = self._open[key] = {}
            self._samples.append((key, sample))
        sample[kind] = member

    def rows(self) -> np.ndarray:
        rows = [self._row(sample) for _, sample in self._samples if _why_unusable(sample) is None]
        return np.array(rows, dtype=ROW)

    def faults(self) -> list[tuple[str, str]]:
        repeated = self.repeated()
        found = []
        for name, sample in self._samples:
            reason = _why_unusable(sample)
            if reason is not None:
                offset = min(member.offset for member in sample.values())
                found.append((sample_key(name, offset, repeated), reason))
        return found

    def repeated(self) -> frozenset[str]:
        counts = Counter(name for name, _ in self._samples)
        return frozenset(name for name, count in counts.items() if count > 1)

    @staticmethod
    def _row(sample: dict[str, Member]) -> tuple[int, ...]:
        parts = (sample.get(kind) for kind in _PARTS)
        return tuple(
            number
            for member in parts
            for number in ((0, 0) if member is None else (member.offset // BLOCK, member.size))
        )


def _rank(member: Member) -> tuple[bool, int, str]:
    """Of several members for one part of a sample the least counts: with a plain ending, of texts in their order."""
    kind = sample_name(member.name)[1]
    ending = kind.rpartition(".")[2]
    return "." in kind, _TEXT_NAMES.index(ending) if ending in _TEXT_NAMES else 0, kind


def _why_unusable(sample: dict[str, Member]) -> str | None:
    if "image" not in sample:
        hint = " (what follows the first dot is the kind)" if any(kind.endswith(IMAGE_NAMES) for kind in sample) else ""
        return f"has no picture, only {', '.join(sorted(sample))}{hint}"
    used = {kind: sample[kind] for kind in _PARTS if kind in sample}
    for kind, member in used.items():
        if member.cut:
            return f"the tar ends inside {member.name}"
        if member.link:
            return f"{member.name} is a link, which has no data of its own"
        if member.size >= 1 << 32 or member.offset // BLOCK >= 1 << 32:
            return f"{member.name} has {member.size} bytes at {member.offset}, more than a picture has"
        if member.size == 0 and kind in ("image", "source"):
            return f"{member.name} is empty"
    return None


class IndexCache:
    """Indexes of tars in files of `folder`, named by the tar's path, size and time; None keeps none.

    What is damaged is made anew. A folder that takes no files is told once, and is no obstacle.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(
        self,
        paths: Sequence[Path],
        *,
        threads: int,
        first: int = 0,
        tell: Callable[[str], None] | None = None,
        every: float = TOLD_EVERY,
    ) -> list[TarIndex | OSError]:
        """The index of each tar, or why it cannot be read; made where it is not there yet.

        Processes that share the folder share the work when each begins at another `first`. `tell` is told how far it
        is, `every` so many seconds.
        """
        order = [(place + first) % len(paths) for place in range(len(paths))]
        found: dict[int, TarIndex | OSError] = {}
        told = time.monotonic()
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="index") as pool:
            for place, index in zip(order, pool.map(self._one, [paths[place] for place in order]), strict=True):
                found[place] = index
                if tell is not None and time.monotonic() - told >= every:
                    told = time.monotonic()
                    tell(f"reading the headers of tars: {len(found)} of {len(paths)}, now {paths[place]}")
        return [found[place] for place in range(len(paths))]

    def _one(self, path: Path) -> TarIndex | OSError:
        try:
            stamp = stamp_of(path.stat())
            kept = self._read(path, stamp)
            if kept is not None:
                return kept
            index = index_tar(path)
        except OSError as error:
            return error
        if self.folder is not None:
            with beside_training("keeping the index of a tar", "it is made again by the next run"):
                self._write(index)
        return index

    def _file(self, path: Path, stamp: tuple[int, int]) -> Path | None:
        name = hashlib.sha256(f"{FORMAT} {path.absolute()} {stamp}".encode("utf-8", "surrogateescape")).hexdigest()
        return None if self.folder is None else self.folder / f"{name[:40]}.tarindex"

    def _read(self, path: Path, stamp: tuple[int, int]) -> TarIndex | None:
        file = self._file(path, stamp)
        if file is None:
            return None
        try:
            head, _, body = file.read_bytes().partition(b"\n")
            facts = json.loads(head)
            if facts["format"] != FORMAT or facts["crc"] != zlib.crc32(body):
                return None
            faults = [(what, reason) for what, reason in facts["faults"]]
            rows, repeated = np.frombuffer(body, dtype=ROW), frozenset(facts["repeated"])
            return TarIndex(path, stamp, facts["digest"], rows, faults, facts["first"], repeated)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, index: TarIndex) -> None:
        """Whole, or not at all."""
        file = self._file(index.path, index.stamp)
        assert file is not None
        body = index.rows.tobytes()
        facts = {"format": FORMAT, "tar": str(index.path), "digest": index.digest, "crc": zlib.crc32(body)}
        head = json.dumps(facts | {"faults": index.faults, "first": index.first, "repeated": sorted(index.repeated)})
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            fresh.write_bytes(head.encode() + b"\n" + body)
            os.replace(fresh, file)
        except OSError:
            with suppress(OSError):
                fresh.unlink()
            raise
