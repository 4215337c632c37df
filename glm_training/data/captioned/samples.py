"""What every layout of captioned pictures gives: samples by row, and what is wrong with those that cannot be given."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from glm_training.data.captioned.layouts.tables.columns import CAPTIONS
from glm_training.data.json_records import Doubled, keeping_pairs
from glm_training.data.problems import Problem
from glm_training.data.text_lines import text_fault

DEFAULT_KEY = "caption"
"""Key of a JSON caption where `cap_source` names none."""

HASHED_CAPTIONS = 10_000
"""Caption files of a set up to which all of them count in its digest; of more, their sizes."""

LEAVE_OUT = "let data.max_bad_fraction leave such samples out"


@dataclass(frozen=True)
class Fault:
    """A sample that cannot be used: the file it is in (a tar, a listing, a picture), its name there, and why.

    ``unsuitable``: it is whole, but too small or too long for training. Such are left out whatever
    `data.max_bad_fraction` allows.
    """

    path: Path
    key: str
    reason: str
    remedy: str
    unsuitable: bool = False

    def problem(self) -> Problem:
        reason = f"{self.key}: {self.reason}" if self.key else self.reason
        return Problem(self.path, reason, self.remedy if self.unsuitable else f"{self.remedy}, or {LEAVE_OUT}")


class BadSample(Exception):
    """Raised in place of a sample."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(str(fault.problem()))

    @property
    def unsuitable(self) -> bool:
        return self.fault.unsuitable


@dataclass(frozen=True)
class Encoded:
    """A picture as its file's bytes, its caption on one line (None from a set that is read without captions), and the
    picture that it was edited from (None unless sources are read)."""

    image: bytes
    caption: str | None
    source: bytes | None = None


class ImageSet(Protocol):
    """Samples of one path, numbered from 0 in an order that depends on the data alone.

    ``name``: the path as the user wrote it. ``layout``: what it is, in words. ``faults``: what cannot be used, known
    without reading a picture; those are not among the rows. ``remarks``: what is worth telling, one line each. Reading
    is safe from several threads.
    """

    name: str
    layout: str
    faults: list[Fault]
    remarks: list[str]

    def __len__(self) -> int: ...

    def read(self, row: int) -> Encoded:
        """The sample; raises BadSample where it is not there, DataError where the data changed since the start."""
        ...

    def part(self, row: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the sample's picture from `offset`, fewer where it ends; raises as `read` does."""
        ...

    def where(self, row: int) -> tuple[Path, str]:
        """The file a sample is in and its name there, which together name it."""
        ...

    def digests(self) -> dict[str, str]:
        """Name of a tar, a listing or a folder -> SHA-256 (hex) of what is in it: its names, sizes and, of a tar, the
        beginning and end of every member; of a small set, the caption files."""
        ...

    def close(self) -> None:
        """Let go of open files."""
        ...


class CaptionFault(Exception):
    """A caption that is none: reason and remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{reason}. {remedy}.")


def caption_of_text(data: bytes, row: int, *, optional: bool = False) -> str:
    """The text of a file, white space and line ends as single spaces; `optional`: it may be empty. Raises
    CaptionFault."""
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaptionFault(f"its caption is not UTF-8 (byte {error.start})", "Save it as UTF-8") from error
    return checked_caption(text, row, optional=optional)


def caption_of_json(data: bytes, key: str, row: int, *, optional: bool = False) -> str:
    """The text under `key` of a JSON object; `optional`: it may be empty. Raises CaptionFault."""
    try:
        record = json.loads(data, object_pairs_hook=keeping_pairs)
    except (ValueError, RecursionError) as error:
        raise CaptionFault(f"its annotation is not JSON: {error}", "Correct it") from error
    if not isinstance(record, dict):
        raise CaptionFault(f"its annotation is a JSON {type(record).__name__}, not an object", "Correct it")
    if isinstance(record, Doubled) and key in record.twice:
        raise CaptionFault(f"its annotation gives {key!r} twice", "Keep one of them")
    caption = record.get(key)
    if optional and key not in record and not any(isinstance(record.get(name), str) for name in CAPTIONS):
        return ""  # settings of a picture, not its caption
    if not isinstance(caption, str):
        what = f"no text under {key!r}" if key in record else f"no key {key!r}"
        texts = [name for name, value in record.items() if isinstance(value, str)]
        if not texts:
            raise CaptionFault(f"its annotation has {what}, nor any text", "Write the caption into a .txt beside it")
        known = f" (texts: {', '.join(texts[:8])})"
        raise CaptionFault(f"its annotation has {what}{known}", "Set cap_source to the key that holds the caption")
    return checked_caption(caption, row, optional=optional)


def checked_caption(text: str, row: int, *, optional: bool = False) -> str:
    """The text on one line; `optional`: it may be empty. Raises CaptionFault."""
    caption = " ".join(text.split())  # one line: files of prompts have one for each
    if not caption:
        if optional:
            return ""
        raise CaptionFault("its caption is empty", "Write one, or set data.trigger_word")
    fault = text_fault(caption, row)
    if fault is not None:
        raise CaptionFault(*fault)
    return caption


class StringTable:
    """Many short texts in two arrays: their bytes and 8 bytes each for where they begin."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]  # file names, of whatever bytes
        self._starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=self._starts[1:])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self._bytes[self._starts[row] : self._starts[row + 1]])


def bounds(folder: Path) -> str:
    """The folder, its links resolved, that the files of `folder` must lie in: itself, or of a snapshot in the cache of
    a hub the repository's folder, where the files are."""
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    is_snapshot = real.parent.name == "snapshots" and (repository / "blobs").is_dir()
    return str(repository if is_snapshot else real)


def as_spelled(root: Path, name: str) -> str:
    """The path `name` below `root` in the form of Unicode in which its file is named, where that is another one."""
    if name.isascii():
        return name
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return next((form for form in forms if os.path.lexists(os.path.join(root, form))), name)


def read_below(root: str, path: Path, offset: int = 0, size: int = -1) -> bytes:
    """The file's bytes, or up to `size` of them from `offset`. `root`: the folder, links resolved, that it must lie
    below, once its links are too. Raises BadSample."""
    try:
        real = os.path.realpath(path)
        if not real.startswith(os.path.join(root, "")):
            raise BadSample(Fault(path, "", f"leads out of {root}", f"Copy the file below {root}"))
        if not os.path.isfile(real):  # opening a pipe would wait for ever
            reason = "is not a regular file" if os.path.exists(real) else "does not exist"
            raise BadSample(Fault(path, "", reason, "Put it there"))
        with open(real, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size) or b""
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSample(Fault(path, "", f"cannot be read: {reason}", "Correct its permissions")) from error


def file_size(root: Path, name: str) -> int | str:
    """Bytes of a file below `root`, or why it is none."""
    top = os.path.abspath(root)
    path = os.path.normpath(os.path.join(top, name))
    if not path.startswith(os.path.join(top, "")):
        return f"{name} does not lie below {root}, where its paths start"
    try:
        return os.stat(path).st_size
    except (OSError, ValueError) as error:
        hint = "; separate folders with /" if "\\" in name else ""
        return f"{path} is not there ({getattr(error, 'strerror', None) or error}){hint}"


def with_captions(digests: Mapping[str, str], captions: Sequence[tuple[str, Path]], root: str) -> dict[str, str]:
    """`digests`, over captions as well: (which of the digests, file) each. Of many the files stay unread."""
    if len(captions) > HASHED_CAPTIONS:
        return dict(digests)
    found = {name: hashlib.sha256(digest.encode()) for name, digest in digests.items()}
    for name, path in captions:
        try:
            data = read_below(root, path)
        except BadSample:
            data = b""  # reading the sample says why
        found[name].update(b"%d:%b" % (len(data), data))
    return {name: digest.hexdigest() for name, digest in found.items()}
