"""The lines of a UTF-8 text file, numbered so that a fault can be pointed at."""

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm_training.data.problems import Problem

_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")

MAX_BYTES = 2**30
"""A listing above this is a file named by mistake: a million prompts take about a tenth of it."""

_OTHER_KINDS = {
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"\x1f\x8b": "gzip-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"SQLite format": "an SQLite database",
    b"%PDF": "a PDF",
    b"{\\rtf": "a Rich Text file",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"version https://git-lfs": "a pointer of Git LFS, whose file is not there (`git lfs pull` fetches it)",
}
"""How a file that is no text of prompts begins."""


@dataclass(frozen=True)
class TextLine:
    """One entry of a listing. ``index`` counts entries from 0, ``number`` the file's lines from 1, as editors do.
    ``text`` has no surrounding white space and is None when it is not UTF-8."""

    index: int
    text: str | None
    number: int


@dataclass(frozen=True)
class TextFile:
    """A file as its lines, with what is wrong with its encoding; ``data`` are its bytes without a mark."""

    path: Path
    lines: list[TextLine] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    data: bytes = b""

    @property
    def text(self) -> str:
        """The whole of it; what is not UTF-8 (and in ``problems``) is replaced."""
        return self.data.decode("utf-8", errors="replace")


def read_text(path: Path) -> TextFile:
    """All lines of ``path`` and what is wrong with their encoding; blank lines at the end of the file are left out.

    Lines end at LF, CR LF or CR and nowhere else: a Unicode line separator inside a prompt must not shift the numbers
    that tie prompts to images. A UTF-8 byte-order mark is tolerated.
    """
    try:
        problem, data = _read_bytes(path)
    except FileNotFoundError:
        problem = Problem(path, "there is no such file", f"Correct the path; the current directory is {Path.cwd()}")
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        problem = Problem(path, f"cannot be read: {reason}", "Correct the path or the file's permissions")
    if problem is not None:
        return TextFile(path, problems=[problem])
    offset = len(_BOM) if data.startswith(_BOM) else 0
    start = offset
    lines: list[TextLine] = []
    problems: list[Problem] = []
    for index, raw in enumerate(data[offset:].splitlines(keepends=True)):
        try:
            lines.append(TextLine(index, _decode(raw), index + 1))
        except UnicodeDecodeError as error:
            position = offset + error.start
            reason = f"is not UTF-8: {error.reason}, byte 0x{raw[error.start]:02x} at offset {position} of the file"
            problems.append(Problem(path, reason, "Save the file as UTF-8", line=index + 1, index=index))
            lines.append(TextLine(index, None, index + 1))
        offset += len(raw)
    while lines and lines[-1].text == "":
        lines.pop()
    return TextFile(path, lines, problems, data[start:])


def _read_bytes(path: Path) -> tuple[Problem | None, bytes]:
    """The bytes of a text file, or why they are none; a pipe, a device or a model's weights are not read."""
    remedy = "Name a text file with one prompt per line, or with one JSON record per line"
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        return Problem(path, "is not a regular file", remedy), b""
    if path.stat().st_size > MAX_BYTES:
        reason = f"has {path.stat().st_size / 1e9:.1f} GB, too many for a listing (at most {MAX_BYTES / 1e9:.1f})"
        return Problem(path, reason, remedy), b""
    with path.open("rb") as file:
        head = file.read(32)
        for mark, kind in _OTHER_KINDS.items():
            if head.lstrip().startswith(mark):
                return Problem(path, f"is {kind}, not a text of prompts", remedy), b""
        if head.startswith(_UTF16_BOMS):
            return Problem(path, "is UTF-16, found at byte 0", "Save the file as UTF-8", line=1), b""
        return None, head + file.read()


def _decode(raw: bytes) -> str:
    nul = raw.find(b"\0")
    if nul >= 0:  # valid UTF-8, but in a text it means UTF-16 without a mark, or a binary file
        raise UnicodeDecodeError("utf-8", raw, nul, nul + 1, "NUL byte")
    return raw.decode("utf-8").strip()


def prompt_fault(record: Mapping[str, object], key: str, index: int) -> tuple[str, str] | None:
    """Why the value under ``key`` of the record with this index is no prompt, and the remedy; None when it is one."""
    prompt = record.get(key)
    if not isinstance(prompt, str):
        return f"key {key!r} is {'not a text' if key in record else 'missing'}", f'Add "{key}": "..."'
    if not prompt.strip():
        return f"the prompt of index {index} is empty", "Write a prompt"
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"the prompt holds half a surrogate pair at character {error.start}", "Write the character itself"
    return None
