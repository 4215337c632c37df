"""An export from beginning to end: checked, written beside its place, verified, given its card and its name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import gettempdir

from glm_training.checkpoint import disk
from glm_training.checkpoint.disk_errors import error_code
from glm_training.export.card import public_base, write_card
from glm_training.export.formats import Wanted, write
from glm_training.export.holding import held
from glm_training.export.places import place_of_a_run
from glm_training.export.push import check_push, push
from glm_training.export.scrub import require_clean, scrub_files
from glm_training.export.source import ExportError
from glm_training.export.verify import draws_by_itself, verified
from glm_training.utils.downloads import in_bytes
from glm_training.utils.folder_lock import FolderInUseError, FolderLock
from glm_training.utils.writable import why_unwritable

PARTIAL = ".partial-"
SLACK_BYTES = 1 << 20
"""The card and settings."""


@dataclass(frozen=True)
class Target:
    """Where an export goes. `draw`: None draws with small models alone. `repository`: on the hub, None for nowhere."""

    folder: Path
    overwrite: bool = False
    draw: bool | None = None
    licence: str | None = None
    repository: str | None = None
    public: bool = False


def check(wanted: Wanted, target: Target) -> None:
    """Raises ExportError, with all that can be known to be wrong before anything is read or written."""
    problems = []
    for look in (wanted.check, lambda: check_push(target.repository, target.folder, public=target.public)):
        try:
            look()
        except ExportError as error:
            problems.append(str(error))
    if target.folder.name in ("", ".."):
        problems.append(f"--out {target.folder}: an export needs a folder with a name of its own, as exports/x")
    elif wanted.source.folder.resolve().is_relative_to(target.folder.resolve()):
        problems.append(f"--out {target.folder}: the checkpoint itself lies there: name another folder")
    elif reason := place_of_a_run(target.folder):
        problems.append(f"--out {target.folder}: {reason}. Name a folder outside of it, as exports/x")
    elif os.path.lexists(target.folder) and not target.overwrite:
        problems.append(f"{target.folder} is there already: name another --out, or add --overwrite, which renames it")
    elif problem := why_unwritable(target.folder.parent):
        problems.append(f"--out: {problem}")
    if problems:
        raise ExportError("\n".join(problems))


def export(wanted: Wanted, target: Target, tell: Callable[[str], None]) -> None:
    """Exports, and pushes if asked. `tell` is called with each line that is known of it.

    Raises ExportError, ModelLoadError: nothing has the target's name then that had it not before, and what was begun is
    removed; but where the push alone failed, the export stands.
    """
    folder = target.folder
    check(wanted, target)
    draw = draws_by_itself(wanted.source) if target.draw is None else target.draw
    needed = wanted.bytes_needed() + SLACK_BYTES
    with (
        _written_whole(folder, needed, target.overwrite) as fresh,
        held(wanted.source, fresh.absolute().parent / "checkpoint", needed) as source,
    ):
        wanted = replace(wanted, source=source)
        write(wanted, fresh, public_base(source))
        scrub_files(fresh)
        lines = verified(wanted, fresh, draw)
        write_card(fresh, wanted, target.repository or folder.name, lines, target.licence)
        places = [source.folder, source.files, folder.absolute(), fresh.absolute(), Path.cwd()]
        require_clean(fresh, [*places, *([] if source.run is None else [source.run.absolute()])])
    for line in lines:
        tell(line)
    if target.repository is not None:
        message = f"{wanted.format} of step {wanted.source.manifest.step}"
        tell(f"pushed to {push(folder, target.repository, public=target.public, message=message)}")


@contextmanager
def _written_whole(folder: Path, needed: int, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name, on the disk, when the block ends, and is removed when that
    raises. What stood there is renamed to `NAME.old-1`, with `overwrite`. Raises ExportError for what the disk does not
    take, and where another export writes to that name or had it first."""
    place = folder.with_name(f"{PARTIAL}{folder.name}")
    fresh, lock, held = place / "export", FolderLock(place), False
    try:
        lock.acquire()
        held = True
        if fresh.exists():  # of an export that was killed
            disk.remove_tree(fresh)
        if disk.free_bytes(fresh.parent) < needed:
            raise OSError(errno.ENOSPC, "not enough free space")
        disk.make_folder(fresh)
        yield fresh
        _sync(fresh)
        _name(fresh, folder, overwrite)
        disk.sync_folder(folder.parent)
    except FolderInUseError as error:
        told = str(error).replace("another run", "it")
        raise ExportError(f"another export to {folder} is under way: {told}. Name another --out") from error
    except BaseException as error:
        if held:
            shutil.rmtree(fresh, ignore_errors=True)
        code, where = error_code(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"{_full(folder, needed)}: nothing was exported. Free some space, or name another --out"
            ) from error
        if isinstance(error, OSError):
            raise ExportError(f"{where or folder}: {error.strerror or error}; nothing was exported") from error
        raise
    finally:
        lock.release()
        with suppress(OSError):  # another export's by now, or there never was one
            place.rmdir()


def _name(fresh: Path, folder: Path, overwrite: bool) -> None:
    """Gives a whole export its name, which another program may have taken since it was looked at. ExportError then."""
    taken = f"{folder} is there by now: nothing was exported. Name another --out, or add --overwrite, which renames it"
    if os.path.lexists(folder):
        if not overwrite:
            raise ExportError(taken)
        aside = (folder.with_name(f"{folder.name}.old-{number}") for number in count(1))
        disk.rename(folder, next(path for path in aside if not os.path.lexists(path)))
    try:
        disk.rename(fresh, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # in between
            raise ExportError(taken) from error
        raise


def _full(folder: Path, needed: int) -> str:
    """Why there was no room for an export of `needed` bytes to `folder`."""
    free = disk.free_bytes(next(path for path in folder.absolute().parents if path.exists()))
    if free < needed:
        return f"the export takes about {in_bytes(needed)}, and {folder.parent} has {in_bytes(free)} free"
    other, left = gettempdir(), disk.free_bytes(Path(gettempdir()))
    # it became larger than was known, or pictures to compare with had no room
    return (
        f"the disk of {folder.parent} (now {in_bytes(free)} free) or that of {other} (TMPDIR, {in_bytes(left)} free) "
        "became full before the export was whole"
    )


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            disk.sync_folder(path)
    disk.sync_folder(folder)
