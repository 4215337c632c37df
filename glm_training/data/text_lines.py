"""The lines of a UTF-8 text file, numbered so that a fault can be pointed at."""

import re
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm_training.data.problems import Problem, correct_path

_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MARKS = frozenset(
    "\"'`´\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u300c\u300d\u300e\u300f\uff02\uff07"
)
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""What no prompt holds, and terminals and trackers do not take; all that is left out here is white space."""

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
    b"<?xml": "XML",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"version https://git-lfs": "a pointer of Git LFS, whose file is not there (`git lfs pull` fetches it)",
}
"""How a file that is no text of prompts begins."""

_UNREAD_IMAGES = re.compile(
    rb".{4}ftyp(?:heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis)|\xff\x0a|\0\0\0\x0cJXL ", re.DOTALL
)
UNREAD_IMAGE = ("is of a kind that is not read (HEIC, AVIF or JPEG XL)", "Convert it to PNG, JPEG or WebP")
"""What is wrong with such a file, and the remedy."""


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
        problem = Problem(path, "there is no such file", correct_path(path))
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
        kind = other_kind(head)
        if kind is not None:
            return Problem(path, f"is {kind}, not a text of prompts", remedy), b""
        for mark, encoding in _OTHER_BOMS.items():
            if head.startswith(mark):
                return Problem(path, f"is {encoding}, found at byte 0", "Save the file as UTF-8", line=1), b""
        return None, head + file.read()


def is_unread_image(head: bytes) -> bool:
    """Whether a file that begins with `head` is a picture of a kind that is not read: HEIC, AVIF or JPEG XL."""
    return _UNREAD_IMAGES.match(head) is not None


def other_kind(head: bytes) -> str | None:
    """What a file that begins with `head` is, in words, where that is known and no text; else None."""
    return next((kind for mark, kind in _OTHER_KINDS.items() if head.lstrip().startswith(mark)), None)


def _decode(raw: bytes) -> str:
    nul = raw.find(b"\0")
    if nul >= 0:  # valid UTF-8, but in a text it means UTF-16 without a mark, or a binary file
        raise UnicodeDecodeError("utf-8", raw, nul, nul + 1, "NUL byte")
    text = raw.decode("utf-8").strip()
    while text.startswith("\ufeff"):  # files with a mark, put one after the other
        text = text[1:].lstrip()
    return text


def text_fault(prompt: str, index: int) -> tuple[str, str] | None:
    """Why ``prompt``, of this index, cannot be drawn, and the remedy; None when it can."""
    if not prompt.strip():
        return f"the prompt of index {index} is empty", "Write a prompt"
    if all(map(_says_nothing, prompt)):
        reason = f"the prompt of index {index} holds quotation marks and characters that nobody sees, and nothing else"
        return reason, "Write a prompt"
    strange = _CONTROL.search(prompt)
    if strange is None:
        return None
    if "\ud800" <= strange[0] <= "\udfff":
        return f"the prompt holds half a surrogate pair at character {strange.start()}", "Write the character itself"
    return f"the prompt holds the control character U+{ord(strange[0]):04X} at character {strange.start()}", "Remove it"


def _says_nothing(character: str) -> bool:
    """Whether it is white space, a quotation mark, or one of those that have no picture (joiners, directions)."""
    return character in _MARKS or character.isspace() or unicodedata.category(character) in ("Cf", "Mn")


def prompt_fault(record: Mapping[str, object], key: str, index: int) -> tuple[str, str] | None:
    """Why the value under ``key`` of the record with this index is no prompt, and the remedy; None when it is one."""
    prompt = record.get(key)
    if not isinstance(prompt, str):
        return f"key {key!r} is {'not a text' if key in record else 'missing'}", f'Add "{key}": "..."'
    return text_fault(prompt, index)
