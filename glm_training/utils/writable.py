"""Places that a user names: where they are, and whether files can be written there, which is tried with nothing left
behind."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` below the home folder that its `~` or `~name` means. Where nobody is called so it stays as it is: nothing
    is there, which is told as of any other path."""
    path = Path(path)
    with suppress(RuntimeError):
        path = path.expanduser()
    return path


def nearest_place(path: str | Path, *elsewhere: str | Path) -> Path | None:
    """What is called alike and has the same suffix where `path` would lie, or in the folders `elsewhere`."""
    path = expanded(path)
    found: dict[str, Path] = {}
    for folder in (path.parent, *map(Path, elsewhere)):
        with suppress(OSError, ValueError):
            for entry in sorted(folder.iterdir()):
                if entry.suffix == path.suffix:
                    found.setdefault(entry.name, entry)
    close = get_close_matches(path.name, found, n=1)
    return found[close[0]] if close else None


def is_too_long(path: str) -> bool:
    """Whether no file system takes `path`: with a name of over 255 bytes, or over 4095 in all."""
    return len(os.fsencode(path)) > 4095 or any(len(os.fsencode(name)) > 255 for name in Path(path).parts)


def why_unwritable(folder: Path) -> str | None:
    """Why `folder`, which need not exist yet, takes no files; None where it does.

    It is tried, since permissions say nothing of an administrator, a read-only disk or a name that is too long: in a
    folder beside the real one, so that nobody sees the real one appear and go.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is {_kind(there)}, not a folder"
    scratch = there / f".try-{uuid.uuid4().hex}"
    try:
        try:
            below = scratch / folder.relative_to(there)
            below.mkdir(parents=True)
            (below / "file").write_bytes(b"x")
            shutil.rmtree(scratch)
        except BaseException:  # a stop, too, leaves nothing behind
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except OSError as error:
        where = f"{folder} takes no files" if there == folder else f"{folder} cannot be made in {there}"
        return f"{where}: {error.strerror or error}"
    except ValueError as error:  # a NUL, or a character that the system's encoding lacks
        return f"{str(folder)!r} is no path here: {error}"
    return None


def why_not_appended(file: Path) -> str | None:
    """Why nothing can be appended to `file`; None where it can, or where there is no such file."""
    if not os.path.lexists(file):
        return None
    if not file.is_file():
        return f"{file} is {_kind(file)}, not a file"
    try:
        file.open("ab").close()
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}"
    return None


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "a device, pipe or socket"
