"""A YAML file with where each of its keys stands, and what is wrong with it as YAML."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_training.config.docs.describe import KeyPath
from glm_training.config.errors import Problem
from glm_training.config.loading.yaml_text import MAX_BYTES, read_yaml
from glm_training.utils.writable import nearest_place

Tree = dict[str, Any]

_OTHER_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass
class Source:
    """The data of a file, or of several laid over one another, before any check, with where each key came from."""

    file: str
    tree: Tree = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line, counted from 1, of each key of the file."""
    files: dict[KeyPath, str] = field(default_factory=dict)
    """For keys that another file laid over `file` set: that file."""
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """For keys that something other than the file set: what did."""
    problems: list[Problem] = field(default_factory=list)

    def locate(self, path: KeyPath) -> tuple[str, int | None]:
        """File and line of a key, or of the nearest section around it that is there."""
        for length in range(len(path), 0, -1):
            prefix = path[:length]
            if prefix in self.origins:
                return self.origins[prefix], None
            if prefix in self.lines:
                return self.files.get(prefix, self.file), self.lines[prefix]
        return self.file, None

    def forget(self, path: KeyPath) -> None:
        """Drop what is known of where `path`, and all below it, came from."""
        for places in (self.lines, self.origins, self.files):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]

    def add(self, path: KeyPath, message: str, suggestion: str | None = None) -> None:
        """Note a problem with the key at `path`."""
        file, line = self.locate(path)
        self.problems.append(Problem(file, line, ".".join(path), message, suggestion))


def read_source(path: Path) -> Source:
    """Read a YAML file. What is wrong with it as YAML is in the result's `problems`."""
    source = Source(str(path))
    try:
        text = _read_text(source, path)
    except FileNotFoundError:
        near = nearest_place(path, "configs", "configs/recipes")
        meant = "" if near is None else f" Did you mean `{near}`?"
        source.add((), "there is no such file.", f"The current directory is `{Path.cwd()}`.{meant}")
        return source
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        source.add((), f"cannot be read: {getattr(error, 'strerror', None) or error}.")
        return source
    if text is None:
        return source
    document = read_yaml(text)
    for fault in document.faults:
        path_text = ".".join(fault.path)
        source.problems.append(Problem(source.file, fault.line, path_text, fault.message, fault.suggestion))
    source.lines = document.lines
    if isinstance(document.value, dict):
        source.tree = document.value
    elif document.value is not None:
        source.add((), "the file must hold `key: value` lines at its top level.")
    return source


def _read_text(source: Source, path: Path) -> str | None:
    """The text of the file; None where it is none, with the problem noted."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        source.add((), f"is {kind}, not a file.", "Name a YAML file.")
        return None
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        source.add((), f"has over {MAX_BYTES // 1024} KiB, which is no configuration.", "Name another file.")
        return None
    for mark, encoding in _OTHER_BOMS.items():
        if data.startswith(mark):
            source.add((), f"is {encoding}.", "Save it as UTF-8.")
            return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}."
        source.problems.append(Problem(source.file, line, "", message, "Save it as UTF-8."))
        return None
