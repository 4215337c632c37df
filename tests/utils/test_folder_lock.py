"""One holder at a time; a holder that is gone is followed, one that may be there is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from glm_training.utils import folder_lock
from glm_training.utils.folder_lock import LOCK, FolderInUseError, FolderLock, Holder
from tests.faulty_system import in_child

HOLD = """
import sys, time
from pathlib import Path
from glm_training.utils.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def left_by(folder: Path, **facts) -> Holder:
    """A lock in `folder` whose holder differs from this process in `facts`."""
    holder = replace(Holder.here(), **facts)
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_bytes(holder.encoded())
    return holder


class Stop(BaseException):
    """What a signal raises."""


def stopped_at(line: int, work: Callable[[], None]) -> bool:
    """Whether `work` came to as many lines of `folder_lock`; a stop came before that one."""
    to_come = line

    def trace(frame, event, argument):
        nonlocal to_come
        if frame.f_code.co_filename != folder_lock.__file__:
            return None
        if event == "line":
            to_come -= 1
            if to_come == 0:
                raise Stop
        return trace

    sys.settrace(trace)
    try:
        work()
    except Stop:
        pass
    finally:
        sys.settrace(None)
    return to_come <= 0


def takes(folder: Path) -> bool:
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except FolderInUseError:
        return False
    assert Holder.decoded((folder / LOCK).read_bytes()).pid == os.getpid()
    lock.release()
    assert not (folder / LOCK).exists()
    return True


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, other):
    with pytest.raises(FolderInUseError) as refused:
        FolderLock(tmp_path).acquire()
    holder = refused.value.holder
    assert holder.pid == other.pid and f"pid {other.pid}, since 20" in str(refused.value)
    assert holder.host in str(refused.value) and "delete" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_killed_process_is_followed(tmp_path, other):
    other.kill()
    other.wait()
    assert takes(tmp_path)


def test_a_killed_process_that_nobody_has_buried_is_followed(tmp_path, other):
    os.kill(other.pid, 9)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert takes(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_a_stop_right_after_the_file_is_there_leaves_nothing(tmp_path, monkeypatch, links):
    link, confirm = os.link, Path.unlink

    def stopped(source, target):
        if not links:
            raise OSError("a disk without links")
        link(source, target)
        raise KeyboardInterrupt

    def stopped_at_the_end(path, **options):
        confirm(path, **options)
        if not links and path.name != LOCK and (path.parent / LOCK).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", stopped)
    monkeypatch.setattr(Path, "unlink", stopped_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        FolderLock(tmp_path / "runs" / "one").acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_to_another_process_is_not_the_holder(tmp_path):
    started = Holder.here().started
    assert started is not None
    left_by(tmp_path, started=started - 1)
    assert takes(tmp_path)


def test_this_process_refuses_itself(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert not takes(tmp_path)
    lock.release()
    lock.release()
    assert takes(tmp_path)


@pytest.mark.parametrize("remove", [lambda folder: (folder / LOCK).unlink(), lambda folder: shutil.rmtree(folder)])
def test_a_lock_that_is_gone_is_taken_again_unless_somebody_has(tmp_path, remove):
    lock, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    lock.acquire()
    assert lock.renew()
    remove(tmp_path / "run")
    assert not lock.renew() and lock.renew() and not takes(tmp_path / "run")
    remove(tmp_path / "run")
    second.acquire()
    with pytest.raises(FolderInUseError):
        lock.renew()
    lock.release()
    assert second.renew(), "it is not given back by the first"
    second.release()


def test_folders_made_for_it_go_with_it_unless_they_are_used(tmp_path):
    lock = FolderLock(tmp_path / "runs" / "one")
    lock.acquire()
    lock.release()
    assert not (tmp_path / "runs").exists()
    lock.acquire()
    (tmp_path / "runs" / "one" / "config.yaml").write_text("")
    lock.release()
    assert (tmp_path / "runs" / "one").is_dir()
    (tmp_path / "mine").mkdir()
    assert takes(tmp_path / "mine") and (tmp_path / "mine").is_dir()


def test_what_another_machine_left_is_not_taken_and_the_way_on_is_told(tmp_path):
    left_by(tmp_path, host="elsewhere", boot="another", pid=999_999)
    with pytest.raises(FolderInUseError, match="cannot be known") as refused:
        FolderLock(tmp_path).acquire()
    assert f"delete {tmp_path / LOCK}" in str(refused.value) and "elsewhere" in str(refused.value)


@pytest.mark.parametrize(
    ("held_by", "here", "taken"),
    [
        ({"slurm": "7", "restarts": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"slurm": "7", "restarts": 1}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"slurm": "6", "restarts": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"elastic": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, True),
        ({"elastic": "a"}, {"TORCHELASTIC_RUN_ID": "b"}, False),
        ({"elastic": None}, {"TORCHELASTIC_RUN_ID": "none"}, False),
    ],
)
def test_a_job_that_was_started_again_on_another_machine_follows_itself(tmp_path, monkeypatch, held_by, here, taken):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    left_by(tmp_path, host="elsewhere", boot="another", pid=999_999, **held_by)
    assert takes(tmp_path) == taken


@pytest.mark.parametrize("machine", [{}, {"host": "elsewhere", "boot": "another"}])
def test_a_job_started_again_where_it_still_runs_is_refused(tmp_path, monkeypatch, other, machine):
    """Seen by the process, and of another machine by the system's lock, where the disk passes that on."""
    holder = Holder.decoded((tmp_path / LOCK).read_bytes())
    (tmp_path / LOCK).write_bytes(replace(holder, elastic="a", **machine).encoded())  # the file stays, and its lock
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    with pytest.raises(FolderInUseError) as refused:
        FolderLock(tmp_path).acquire()
    assert "cannot be known" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"held\0", b"[]", b"[" * 100_000, {"pid": 10**30}, {"pid": True}, {"pid": "7"}, {"restarts": "1"}],
    ids=["empty", "text", "a-list", "deep", "pid-beyond", "pid-true", "pid-text", "restarts-text"],
)
def test_what_no_process_wrote_is_no_lock(tmp_path, monkeypatch, content):
    monkeypatch.setattr(folder_lock, "_PAUSE_SECONDS", 0.001)
    if isinstance(content, dict):
        content = json.dumps(json.loads(Holder.here().encoded()) | content).encode()
    (tmp_path / LOCK).write_bytes(content)
    assert takes(tmp_path)


def test_of_another_table_of_processes_the_systems_lock_tells(tmp_path, monkeypatch, other):
    """A container on this machine: its numbers say nothing here."""
    monkeypatch.setattr(folder_lock, "_process_table", lambda: "another")
    assert not takes(tmp_path)
    other.kill()
    other.wait()
    assert takes(tmp_path)


def test_without_the_systems_locks_the_process_itself_tells(tmp_path, monkeypatch, other):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert not takes(tmp_path)
    other.kill()
    other.wait()
    assert takes(tmp_path)
    assert not Holder.here().guarded
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["guarded"] is False
    lock.release()


def test_on_a_disk_without_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_lock.os, "link", refuse)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert not takes(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK).write_bytes(b'{"id": "tor')  # torn by a death
    monkeypatch.setattr(folder_lock, "_PAUSE_SECONDS", 0.001)
    assert takes(tmp_path)


def test_a_forked_child_gives_nothing_back(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    child.start()
    child.join()
    assert (tmp_path / LOCK).exists() and not takes(tmp_path)
    lock.release()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path, stale):
    """Threads stand for processes here: a holder is known by its own file, not by the process alone."""
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        if stale:
            left_by(folder, pid=2**22 + 1)  # above what Linux gives
        locks, got = [FolderLock(folder) for _ in range(8)], []
        start = threading.Barrier(len(locks))

        def take(lock, got=got, start=start):
            start.wait()
            try:
                lock.acquire()
                got.append(lock)
            except FolderInUseError:
                pass

        threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1, attempt
        assert [path.name for path in folder.iterdir()] == [LOCK]
        got[0].release()


def test_one_that_looks_late_leaves_the_lock_of_one_that_was_faster(tmp_path, monkeypatch):
    """It saw a dead process' lock, and by the time it removes that, another has taken over."""
    left_by(tmp_path, pid=2**22 + 1)
    faster, late = FolderLock(tmp_path), FolderLock(tmp_path)
    is_alive, rename = folder_lock._is_alive, os.rename

    def overtaken(holder, path):
        monkeypatch.setattr(folder_lock, "_is_alive", is_alive)
        seen = is_alive(holder, path)
        faster.acquire()

        def refuse(source, target):
            raise AssertionError("a lock that is held was moved, and for a moment anybody could have it")

        monkeypatch.setattr(os, "rename", refuse)
        return seen

    monkeypatch.setattr(folder_lock, "_is_alive", overtaken)
    with pytest.raises(FolderInUseError, match=f"pid {os.getpid()}"):
        late.acquire()
    monkeypatch.setattr(os, "rename", rename)
    assert not takes(tmp_path)
    faster.release()
    assert list(tmp_path.iterdir()) == []


def stopped_everywhere(folder: Path) -> int:
    taken = False

    def work():
        nonlocal taken
        taken = False
        with ExitStack() as stack:
            lock = FolderLock(folder / "run" / "checkpoints")
            stack.callback(lock.release)
            lock.acquire()
            taken = True

    stops = {False: 0, True: 0}
    while stopped_at(sum(stops.values()) + 1, work):
        folder_lock.release_all()  # as a command does that was stopped
        left = [path for path in folder.rglob("*") if not taken or path.is_file()]
        assert (left, list(folder_lock._held)) == ([], []), (taken, stops)
        shutil.rmtree(folder / "run", ignore_errors=True)
        stops[taken] += 1
    assert min(stops.values()) > 15, stops
    return 0


def test_a_stop_anywhere_in_taking_leaves_nothing_and_in_giving_back_no_lock(tmp_path):
    (tmp_path / "runs").mkdir()
    told = tmp_path / "told"
    assert in_child(told, lambda: stopped_everywhere(tmp_path / "runs")) == 0, told.read_text()


def test_all_are_given_back_from_the_inside(tmp_path):
    for folder in (tmp_path / "run", *(tmp_path / "run" / name for name in "abcdefgh")):
        FolderLock(folder).acquire()
    folder_lock.release_all()
    assert list(tmp_path.iterdir()) == []
