"""What to say when the disk does not take a checkpoint."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from glm_training.checkpoint import disk
from glm_training.checkpoint.state_tree import CheckpointError

_RUST = re.compile(r"\(os error (\d+)\)")
_MOVE = "move checkpoint.save_dir elsewhere"
REMEDIES = {
    errno.ENOSPC: "Free some space, lower checkpoint.save_total_limit, or move checkpoint.save_dir to a larger disk",
    errno.EDQUOT: f"Your quota there is used up: free some of it, lower checkpoint.save_total_limit, or {_MOVE}",
    errno.EROFS: f"The file system is mounted read-only, often after an error of its disk: mend it, or {_MOVE}",
    errno.EACCES: f"This user may not write there: correct the permissions, or {_MOVE}",
    errno.EPERM: f"The system does not permit it: correct the permissions and attributes, or {_MOVE}",
    errno.EIO: f"The disk or the way to it is failing (see the system's log): mend it, or {_MOVE}",
    errno.ESTALE: f"The network file system has lost the folder: mount it again, or {_MOVE}",
    errno.ENOTDIR: f"A file stands where a folder was: remove it, or {_MOVE}",
    errno.ENOENT: f"A folder was removed while the run wrote there: leave it to the run, or {_MOVE}",
    errno.EFBIG: f"The file system or `ulimit -f` allows no file of that size: raise the limit, or {_MOVE}",
    errno.EMFILE: "Too many files are open: raise the limit (`ulimit -n`)",
    errno.ENFILE: "The system has too many files open: close some, or raise its limit (fs.file-max)",
    errno.ENAMETOOLONG: "The path is too long: give checkpoint.save_dir a shorter one",
}


class SaveError(CheckpointError):
    """A checkpoint cannot be written; the message says what the disk reports and what to do. The one before stands."""


class DiskFullError(SaveError):
    """The disk has no room for the checkpoint; the message says how many bytes it takes."""


@contextmanager
def naming_disk_errors(step: int, needed: int, exports_unknown: bool, folder: Path) -> Iterator[None]:
    """Inside, an error of the operating system, raised as such or in the words of a library, becomes a SaveError.

    Args:
        step: whose checkpoint is being written. needed: its bytes; `exports_unknown`: without its exports.
        folder: where checkpoints go.
    """
    try:
        yield
    except Exception as error:  # libraries wrap what the disk says in classes of their own
        code, place = error_code(error)
        if code is None and not isinstance(error, OSError | SafetensorError):
            raise
        if code in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            more = " plus what its exports take" if exports_unknown else ""
            raise DiskFullError(
                f"the checkpoint of step {step} needs {needed} bytes ({needed / 2**30:.2f} GiB){more}, and {folder} "
                f"has {disk.free_bytes(existing)} free; the previous checkpoint is untouched. {REMEDIES[code]}"
            ) from error
        reported = str(error) if code is None else os.strerror(code)
        raise SaveError(
            f"the checkpoint of step {step} cannot be written to {place or folder}: {reported}; the previous "
            f"checkpoint is untouched. {remedy_for(code)}; --resume then continues from there"
        ) from error


def remedy_for(code: int | None) -> str:
    """What to do about an error of the operating system, as far as its code is known."""
    return "Mend that" if code is None else REMEDIES.get(code, f"Mend that, or {_MOVE}")


def error_code(error: BaseException) -> tuple[int | None, str | None]:
    """The operating system's error code and the path behind an exception; None where there is none.

    Exporters wrap what they meet, and those written in Rust (safetensors, tokenizers) tell the code as text.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            return link.errno, None if link.filename is None else os.fsdecode(link.filename)
        if found := _RUST.search(str(link)):
            return int(found[1]), None
        if "No space left" in str(link):
            return errno.ENOSPC, None
        link = link.__cause__ or link.__context__
    return None, None
