"""Digests of a dataset, so that a resumed run can tell that its data changed, and where."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from glm_training.data.examples import Example
from glm_training.data.problems import DataError, Problem


def file_digests(examples: Sequence[Example]) -> dict[Path, str]:
    """Image file of the examples -> SHA-256 (hex) of its bytes; each is read once."""
    paths = [path for example in examples for path in (example.target, example.source) if path is not None]
    return {path: _file_digest(path) for path in dict.fromkeys(paths)}


def example_digests(examples: Sequence[Example], files: Mapping[Path, str]) -> dict[str, str]:
    """Index (as text, for JSON) -> SHA-256 of the prompt and of the image files' bytes, whatever their paths; `files`
    from `file_digests`."""
    digests: dict[str, str] = {}
    for example in examples:
        digest = hashlib.sha256()
        parts = [example.prompt]
        for path in (example.target, example.source):
            parts.append("" if path is None else files[path])
        for part in parts:
            data = part.encode("utf-8")
            digest.update(b"%d:%b" % (len(data), data))
        digests[str(example.index)] = digest.hexdigest()
    return digests


def combined_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 of all examples, in order."""
    text = "\n".join(f"{index} {digest}" for index, digest in digests.items())
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def describe_drift(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What changed between two results of :func:`example_digests`, one line per example; empty when nothing did. Keys
    that are no index name what the digest is of: a tar, a listing or a folder of pictures."""
    changes = []
    for name in sorted(before.keys() | after.keys(), key=lambda name: (not name.isdecimal(), name.zfill(20))):
        place, content = (f"index {name}", "prompt or image") if name.isdecimal() else (name, "what is in it")
        if name not in after:
            changes.append(f"{place}: removed")
        elif name not in before:
            changes.append(f"{place}: added")
        elif before[name] != after[name]:
            changes.append(f"{place}: {content} changed")
    return changes


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        problem = Problem(path, f"cannot be read: {error.strerror}", "Restore the file or scan the data again")
        raise DataError([problem]) from error
