import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from glm_training.utils import signals
from glm_training.utils.distributed import World
from glm_training.utils.signals import StopSignals

pytestmark = pytest.mark.usefixtures("heeds_hangups")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_remembered_and_the_second_aborts(number, code, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.getsignal(number)
    with StopSignals(World()) as stop:
        assert not stop.poll() and not stop.requested() and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.poll() and stop.requested() and stop.received == number and stop.exit_code == code
        with pytest.raises(SystemExit) as abort:
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert abort.value.code == code
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("warning", "code"), [(signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGHUP, 129)])
def test_a_warning_is_followed_by_the_first_request(monkeypatch, warning, code):
    """`sbatch --signal=USR1@60`: the run saves; what Slurm sends when the time is up does not tear that save. Of a
    terminal that goes away a process may be told by the system and by its shell."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.getsignal(warning)
    with StopSignals(World()) as stop:
        os.kill(os.getpid(), warning)
        assert stop.poll() and stop.received == warning and stop.exit_code == code
        os.kill(os.getpid(), warning)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() and stop.exit_code == 143
        os.kill(os.getpid(), warning)
        assert stop.exit_code == 143
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(warning) is before


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(World()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.poll()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_only_has_to_say_why_it_ends_is_not_cut_short_afterwards():
    """A process whose peer has died ignores the SIGTERM that torchrun sends then (`leave_together`)."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignals(World()):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_whoever_waits_for_signals_outside_does_not_meanwhile():
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    former = signal.set_wakeup_fd(theirs.fileno())
    try:
        with StopSignals(World()):
            os.kill(os.getpid(), signal.SIGTERM)
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
        assert signal.set_wakeup_fd(former) == theirs.fileno()
    finally:
        signal.set_wakeup_fd(former)
        ours.close()
        theirs.close()


def test_what_torchrun_forwards_is_not_a_second_request(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopSignals(World()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() and stop.exit_code == 130
        monkeypatch.setattr(signals.time, "monotonic", lambda: stop._first_at + signals.FORWARDING_SECONDS)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_is_left_alone():
    seen = []

    def work():
        with StopSignals(World()) as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.poll()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def stop_one_of_two(rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    with StopSignals(World(rank, 2, rank)) as stop:
        assert not stop.poll()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() and stop.received == signal.SIGTERM
    raise SystemExit(stop.exit_code)


def test_one_process_stops_all_with_one_code(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=stop_one_of_two, args=(rank, tmp_path / "meeting")) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [143, 143]
