"""An exclusive lock of a folder: a file in it that says which process holds it, on any disk.

The file appears whole under its name or not at all, which holds on network disks too. Where the system has locks of its
own the holder keeps one on the file, but nothing depends on it alone: not every disk passes it on to other machines.
A lock whose holder is gone is taken over. Whether it is gone is known on the same machine, by the process and when it
started (its number may have been given to another); of another machine it is known where the system's lock reaches that
far, and of a job that the scheduler has started again.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

LOCK = "run.lock"
_ATTEMPTS = 20
_PAUSE_SECONDS = 0.05
_BEYOND = 1 << 30
"""Windows locks a range of bytes, which nobody else may then read: one behind all that the file has."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    `since`: local time, for people. `started`: the process' start in clock ticks since the machine's; `boot`,
    `namespace`: which start of which machine, and which of its tables of processes, `pid` is a number of. All three are
    None where the system does not tell. `elastic`, `slurm`: the job it belongs to, and `restarts`: how often Slurm
    had started that anew. `guarded`: whether it has a lock of the system's on the file.
    """

    id: str
    host: str
    pid: int
    since: str
    started: int | None
    boot: str | None
    namespace: str | None
    elastic: str | None
    slurm: str | None
    restarts: int
    guarded: bool = False

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"

    def encoded(self) -> bytes:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1).encode("ascii")

    @staticmethod
    def decoded(content: bytes) -> Holder | None:
        """The holder that `content` names; None where it is not whole."""
        try:
            told = json.loads(content)
            holder = Holder(**{field.name: told[field.name] for field in fields(Holder)})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        whole = type(holder.pid) is int and 0 < holder.pid < 1 << 31 and type(holder.restarts) is int
        return holder if whole else None

    @staticmethod
    def here() -> Holder:
        """This process, as it would hold a lock from now on."""
        elastic, restarts = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        return Holder(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            started=_start_of(os.getpid()),
            boot=_told_by("/proc/sys/kernel/random/boot_id"),
            namespace=_process_table(),
            elastic=None if elastic in (None, "", "none") else elastic,
            slurm=os.environ.get("SLURM_JOB_ID"),
            restarts=int(restarts) if restarts.isdecimal() else 0,
        )


class FolderInUseError(RuntimeError):
    """Another process holds the lock, or one of which it cannot be known whether it is still there."""

    def __init__(self, folder: Path, holder: Holder | None, *, certain: bool) -> None:
        self.holder = holder
        if certain or holder is None:
            super().__init__(f"{folder} is in use by another run ({holder or 'which is just beginning'})")
            return
        super().__init__(
            f"{folder} is in use by another run ({holder}), or was when that ended without a trace: it cannot be known "
            f"from here whether it still runs on {holder.host}. If it does not, delete {folder / LOCK} and start again"
        )


_held: dict[FolderLock, None] = {}  # in the order in which they were taken


def release_all() -> None:
    """Gives back the locks of this process, which is about to end without unwinding."""
    for lock in reversed(tuple(_held)):  # a folder that is inside another goes first
        lock.release()


class FolderLock:
    """Held from `acquire` to `release`, by this process and not by those it forks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self._holder: Holder | None = None
        self._file: BinaryIO | None = None
        self._fresh: Path | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Takes the lock, from a holder that is gone too; makes the folder if absent.

        Raises FolderInUseError, and OSError where the disk takes no such file.
        """
        try:
            self._make_folder()
            took_over = False
            for _ in range(_ATTEMPTS):
                if self._create() and (not took_over or self._confirmed()):
                    _held[self] = None
                    return
                took_over |= self._clear()
            raise FolderInUseError(self.folder, None, certain=True)
        except BaseException:  # a stop, too, leaves nothing behind
            self.release()
            self._close()
            self._remove_folders()
            raise

    def renew(self) -> bool:
        """Whether the lock is still held. One that is gone, alone or with its folder, is taken anew first: then False.

        Raises FolderInUseError where another process has it by now, and OSError where the disk takes no such file.
        """
        try:
            if Holder.decoded(self.path.read_bytes()) == self._holder:
                return True
        except FileNotFoundError:
            pass
        except OSError:
            return True  # the disk does not say: whoever writes there will be told why
        self._holder = None
        self._close()
        self.acquire()
        return False

    def release(self) -> None:
        """Gives the lock back, and removes folders that were made for it and hold nothing; safe to call twice."""
        try:
            self._give_back()
        except BaseException:  # a stop leaves nothing behind here either
            self._give_back()
            raise

    def _give_back(self) -> None:
        holder = self._holder
        if holder is not None and holder.pid == os.getpid():
            with suppress(OSError):
                if Holder.decoded(self.path.read_bytes()) == holder:
                    if sys.platform == "win32":  # which removes no open file
                        self._close()
                    self.path.unlink()
            self._close()
            self._remove_folders()
        self._holder = None
        _held.pop(self, None)

    def moved(self, source: Path, target: Path) -> bool:
        """Says that the folder `source` is called `target` now; whether it is this lock's, or holds it."""
        inside = self.folder.is_relative_to(source)
        if inside:
            self.folder = target / self.folder.relative_to(source)
            self.path, self._made = self.folder / LOCK, []
        return inside

    def _make_folder(self) -> None:
        # known before they are there: whoever is stopped in between must remove them
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_folders(self) -> None:
        with suppress(OSError):  # the first that holds something
            for folder in self._made:
                with suppress(FileNotFoundError):
                    folder.rmdir()
        self._made = []

    def _create(self) -> bool:
        """The file, with all of its content and the system's lock on it; False where there is one already."""
        holder, fresh = Holder.here(), self.path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
        self._fresh = fresh
        self._file = fresh.open("xb")
        made = False
        try:
            holder = replace(holder, guarded=bool(_try_system_lock(self._file)))
            self._file.write(holder.encoded())
            self._file.flush()
            self._holder = holder  # before the file is there: whoever is stopped in between must know it for its own
            try:
                os.link(fresh, self.path)
            except FileExistsError:
                self._holder = None
                return False
            except OSError:  # a disk without links: others may see the file half written, and no lock of the system's
                self._holder = replace(holder, guarded=False)
                try:
                    with self.path.open("xb") as file:
                        file.write(self._holder.encoded())
                except FileExistsError:
                    self._holder = None
                    return False
            made = True
        finally:
            if not made:
                self._close()
            with suppress(OSError):  # Windows removes no open file: it goes when that is closed
                fresh.unlink()
        return True

    def _confirmed(self) -> bool:
        """Whether the lock is still this process' after others, who saw the same lock of a dead one, had their turn."""
        for _ in range(_ATTEMPTS):
            time.sleep(_PAUSE_SECONDS)
            with suppress(FileNotFoundError):
                if Holder.decoded(self.path.read_bytes()) == self._holder:
                    return True
                break
        self._holder = None
        self._close()
        return False

    def _clear(self) -> bool:
        """Moves a lock of a dead process out of the way. Raises FolderInUseError for one that may be alive."""
        content = b""
        for _ in range(_ATTEMPTS):
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                return False
            if Holder.decoded(content) is not None:
                break
            time.sleep(_PAUSE_SECONDS)  # where a disk has no links the file is written under its name
        holder = Holder.decoded(content)
        alive = False if holder is None else _is_alive(holder, self.path)
        if alive is not False:
            raise FolderInUseError(self.folder, holder, certain=alive is True)
        with ExitStack() as stack:
            with suppress(OSError):  # gone, or somebody else's; Windows renames no open file
                file = stack.enter_context(self.path.open("r+b")) if sys.platform != "win32" else None
                if file is not None and _try_system_lock(file) is False:
                    time.sleep(_PAUSE_SECONDS)  # another process is about to do the same
                    return True
            self._put_aside(content)
        return True

    def _put_aside(self, content: bytes) -> None:
        """Removes the lock if it still has this content. Where the system has locks, one process at a time is here."""
        aside = self.path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
        try:
            if self.path.read_bytes() != content:
                return
            os.rename(self.path, aside)
        except FileNotFoundError:
            return  # another process was faster
        if aside.read_bytes() != content:  # it was, and this is already its lock: it gets it back
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._fresh is not None:
            with suppress(OSError):
                self._fresh.unlink()
            self._fresh = None


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`, or may."""
    try:
        holder = Holder.decoded((folder / LOCK).read_bytes())
    except FileNotFoundError:
        return False
    return holder is not None and _is_alive(holder, folder / LOCK) is not False


def _is_alive(holder: Holder, path: Path) -> bool | None:
    """Whether the holder of the lock at `path` still runs; None where that cannot be known from here."""
    here = Holder.here()
    same_machine = holder.boot == here.boot if holder.boot and here.boot else holder.host == here.host
    if same_machine and holder.namespace == here.namespace and os.name == "posix":
        running = _is_running(holder)
        if running is not None:
            return running
    free = _try_system_lock_of(path)
    if free is False:
        return True
    if same_machine and holder.guarded and free:
        return False
    if not same_machine and holder.slurm is not None and holder.slurm == here.slurm:
        if holder.restarts < here.restarts:
            return False  # Slurm starts a job again once it is over on all machines
    if not same_machine and holder.elastic is not None and holder.elastic == here.elastic:
        return False  # torchrun ends the processes of a round before it begins the next
    return None


def _is_running(holder: Holder) -> bool | None:
    """Of a process of this machine; None where its number is taken and the system does not tell since when."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    started = _start_of(holder.pid)
    if started is None or holder.started is None:
        return None
    return started == holder.started


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; -1 for one that is over and only not yet buried;
    None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])  # proc_pid_stat(5): fields 3 and 22
    except (OSError, IndexError, ValueError):
        return None


def _told_by(file: str) -> str | None:
    try:
        return Path(file).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _process_table() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _try_system_lock_of(path: Path) -> bool | None:
    """Whether nobody has the system's lock on the file at `path`; None where that cannot be asked."""
    try:
        with path.open("r+b") as file:
            return _try_system_lock(file)
    except OSError:
        return None


def _try_system_lock(file: BinaryIO) -> bool | None:
    """Takes the system's lock on an open file, until it is closed: True; False if another has it; None where there are
    none."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return None
