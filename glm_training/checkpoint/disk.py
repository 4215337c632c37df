"""The file-system operations a commit is made of: the one seam at which tests kill a save.

``commit`` changes the disk through these functions only, each of which is one step that happens or does not.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO


def make_folder(path: Path) -> None:
    """Make one new folder; its parent must exist, it must not."""
    path.mkdir()


def create_file(path: Path) -> BinaryIO:
    """Open a new file for writing; it must not exist."""
    return path.open("xb")


def write(handle: BinaryIO, data: bytes | memoryview) -> None:
    """Append bytes to an open file."""
    handle.write(data)


def sync_file(handle: BinaryIO) -> None:
    """Force an open file's bytes onto the disk."""
    handle.flush()
    os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries (names made, renamed and removed in it) onto the disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync files alone
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Move a file over another or a folder to a free name, in one step."""
    os.replace(source, target)


def remove_file(path: Path) -> None:
    """Delete a file."""
    path.unlink()


def remove_tree(path: Path) -> None:
    """Delete a folder and what is in it."""
    shutil.rmtree(path)


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write to the file system that holds ``path``."""
    return shutil.disk_usage(path).free
