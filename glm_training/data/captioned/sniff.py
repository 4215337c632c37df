"""What a file is, told by how it begins."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from glm_training.data.captioned.layouts.tars.members import BLOCK, is_tar
from glm_training.data.problems import DataError, Problem
from glm_training.data.text_lines import is_unread_image, other_kind

LOOKED_AT = 64
"""Files of a folder that are opened to tell what it holds; so many folders below it where its own do not tell."""

_LOOKED_AT_BELOW = 8
"""Files of each of those."""

_LEFT_BEHIND = ("__MACOSX", "@eaDir")
"""Folders that systems leave in archives and on network drives."""

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif")

_IMAGES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL)
_RECORDS = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|\]|\Z)")


def kind_of(path: Path) -> str:
    """`tar`, `image`, `JSON list`, `JSON object`, `text`, `empty`, `unread image` (HEIC, AVIF, JPEG XL), another kind
    in words (`gzip-compressed`), `unreadable: ...`, `no regular file` or `unknown`."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return "no regular file"
        with path.open("rb") as file:
            head = file.read(BLOCK)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not head:
        return "empty"
    if is_tar(head):
        return "tar"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if _IMAGES.match(head):
        return "image"
    if is_unread_image(head):
        return "unread image"
    other = other_kind(head)
    if other is not None:
        return other
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"[", b"{"):
        return "JSON list" if text[:1] == b"[" else "JSON object"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)  # a character may be cut at the end
    except UnicodeDecodeError:
        return "unknown"
    return "unknown" if b"\0" in text else "text"


def kind_in_folder(path: Path) -> str:
    """As :func:`kind_of`, but `JSON list` only for what may be a listing: neither for a caption that begins with a
    bracket nor for one that lies beside its picture."""
    kind = kind_of(path)
    if kind != "JSON list":
        return kind
    with path.open("rb") as file:
        holds_records = _RECORDS.match(file.read(BLOCK)) is not None
    return kind if holds_records and not _beside_a_picture(path) else "text"


def _beside_a_picture(path: Path) -> bool:
    suffixes = [suffix for name in IMAGE_SUFFIXES for suffix in (name, name.upper())]
    return any(path.with_suffix(suffix).exists() for suffix in suffixes)


def walk_below(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """`folder` and the folders below it, in the order of names, each once, with the names of its files. Hidden ones are
    passed over, links are followed. Raises DataError."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        problem = Problem(Path(error.filename), f"cannot be listed: {error.strerror}", "Correct its permissions")
        raise DataError([problem]) from error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_BEHIND)
        yield parent, sorted(name for name in names if not name.startswith("."))


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, as :func:`walk_below` has them."""
    return (Path(parent, name) for parent, names in walk_below(folder) for name in names)


def some_files(folder: Path) -> list[Path]:
    """Up to LOOKED_AT files, evenly spaced among those that lie in `folder` itself."""
    return _spread(folder, own_files(folder), LOOKED_AT)


def some_files_below(folder: Path) -> list[Path]:
    """A few files of each of the first folders below `folder` that hold any: beside a README nothing else may lie in
    `folder` itself."""
    holding = ((Path(parent), names) for parent, names in walk_below(folder) if names and Path(parent) != folder)
    few = (_spread(parent, names, _LOOKED_AT_BELOW) for parent, names in islice(holding, LOOKED_AT))
    return [path for paths in few for path in paths]


def own_files(folder: Path) -> list[str]:
    """Names of the files that lie in `folder` itself, hidden ones left out."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))


def may_list(folder: Path, names: Sequence[str]) -> list[Path]:
    """Of the files of a folder those that may list pictures: no picture by their names, nor beside one. Those named
    like tables come first."""
    pictures = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    stems = {os.path.splitext(name)[0] for name in pictures} | set(pictures)
    rest = [name for name in names if not name.lower().endswith(IMAGE_SUFFIXES)]
    rest = [name for name in rest if os.path.splitext(name)[0] not in stems]
    rest.sort(key=lambda name: (not name.lower().endswith(TABLE_SUFFIXES), name))
    return [folder / name for name in rest[:LOOKED_AT]]


def _spread(folder: Path, names: Sequence[str], most: int) -> list[Path]:
    count = min(len(names), most)
    return [folder / names[place * len(names) // count] for place in range(count)]


def first_lines(path: Path, count: int = 3) -> str:
    """How a text begins, for messages."""
    with path.open("rb") as file:
        lines = file.read(2048).decode("utf-8", "replace").splitlines()
    return " | ".join(line.strip()[:100] for line in lines[:count])
