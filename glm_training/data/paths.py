"""Which paths a dataset may name: local files below their root, after every link has been followed."""

import re
from pathlib import Path

_URL = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.-]+:/|data:)", re.ASCII)


class PathRefused(Exception):
    """A path that is not read; carries the reason and what the user can do."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{reason}. {remedy}.")


def local_path(value: str | Path) -> Path:
    """``value`` as a path; raises :class:`PathRefused` for a URL, which is never fetched."""
    if _URL.match(str(value)):
        raise PathRefused(f"{value} is a URL, and URLs are not read", "Download the file and give its local path")
    return Path(value)


def path_below(root: Path, relative: str) -> Path:
    """The file ``relative`` to ``root``, links resolved; raises :class:`PathRefused` unless it lies below ``root``."""
    path = local_path(relative)
    if path.is_absolute():
        raise PathRefused(f"{relative} is an absolute path", f"Give it relative to {root}")
    return resolve_below(root, root / path)


def resolve_below(root: Path, path: Path) -> Path:
    """``path`` with links resolved; raises :class:`PathRefused` unless it exists below ``root``."""
    try:
        resolved = path.resolve(strict=True)
        inside = resolved.is_relative_to(root.resolve(strict=True))
    except FileNotFoundError as error:
        if path.is_symlink():
            raise PathRefused(f"{path} is a link to nothing", "Put the image there") from error
        hint = "; separate folders with /" if "\\" in str(path) else ""
        raise PathRefused(f"{path} does not exist", f"Put the image there or correct the path{hint}") from error
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, no permission, NUL in a name
        raise PathRefused(f"{str(path)!r} cannot be followed: {error}", "Correct the path") from error
    if not inside:
        remedy = f"Copy the file below {root}, or name the folder it really lies in"
        raise PathRefused(f"{path} leads out of {root} to {resolved}", remedy)
    return resolved
