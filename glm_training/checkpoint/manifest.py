"""``manifest.json``: the size and SHA-256 of every file of a checkpoint, and a digest of itself. Written last."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from glm_training.checkpoint.state_tree import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the SHA-256 of its content in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step a checkpoint was made after, its states, the caller's metadata, and its files by relative path."""

    step: int
    states: tuple[str, ...]
    metadata: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    @property
    def run(self) -> str | None:
        """The id of the run that made the checkpoint; None where it was made before runs had ids."""
        return self.metadata.get("run")

    def encoded(self) -> bytes:
        """The bytes of ``manifest.json``."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "states": list(self.states),
            "metadata": dict(self.metadata),
            "files": {path: {"size": record.size, "sha256": record.sha256} for path, record in self.files.items()},
        }
        return json.dumps({"digest": _body_digest(body), **body}, indent=1, allow_nan=False).encode("ascii")


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def digest_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as the disk gives it back."""
    with path.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        return FileRecord(handle.tell(), sha256)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest alone, without looking at its other files.

    Raises:
        CheckpointError: when it is missing, is not what was written, or is of another format.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest")
        if digest != _body_digest(body):
            raise CheckpointError(f"{path} is not what was written: its digest differs")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {body['format']}; this version reads format {FORMAT}")
        files = {name: FileRecord(record["size"], record["sha256"]) for name, record in body["files"].items()}
        return Manifest(body["step"], tuple(body["states"]), body["metadata"], files)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def verify_checkpoint(folder: Path, below: str = "", only: Collection[str] | None = None) -> Manifest:
    """Read every file of a checkpoint, of its folder ``below`` or of those called ``only``, and compare it with the
    manifest.

    Raises:
        CheckpointError: naming every file that is missing, of another size or of another content.
    """
    manifest = read_manifest(folder)
    files = {name: record for name, record in manifest.files.items() if not below or name.startswith(f"{below}/")}
    files = {name: record for name, record in files.items() if only is None or name in only}
    problems = [problem for name, record in files.items() if (problem := _problem(folder, name, record))]
    if problems:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    return manifest


def _problem(folder: Path, name: str, record: FileRecord) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return f"{name} lies outside the checkpoint"
    try:
        found = digest_file(folder / relative)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found.size != record.size:
        return f"{name} has {found.size} bytes instead of {record.size}"
    return None if found.sha256 == record.sha256 else f"{name} has another SHA-256 than when it was written"
