"""Processes that torchrun starts again meet in the store of those before them, and not those."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from glm_training.utils import launch
from glm_training.utils.distributed import gather_objects, init_world

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def port():
    """That of a store like torchrun's, which outlives the processes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def _variables(port: int, rank: int, count: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(count),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": "0",
    }


def _attempt(variables: dict[str, str], told) -> None:
    os.environ |= variables
    launch.JOIN_TIMEOUT = launch.FAULT_TIMEOUT = timedelta(seconds=10)
    world = init_world(True, "gloo", "cpu")
    told.put((world.rank, gather_objects(world, os.getpid())))
    told.close()
    told.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)  # with nothing given back


def _meet(port: int, counts: tuple[int, int]) -> None:
    """One attempt of two processes, whose nodes count so many restarts."""
    told = FORK.Queue()
    pair = [FORK.Process(target=_attempt, args=(_variables(port, rank, counts[rank]), told)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(40)
    assert [process.exitcode for process in pair] == [-signal.SIGKILL, -signal.SIGKILL]
    pids = [process.pid for process in pair]
    assert sorted(told.get(timeout=5) for _ in pair) == [(0, pids), (1, pids)]


def _ask(variables: dict[str, str]) -> None:
    os.environ |= variables
    init_world(True, "gloo", "cpu")


@pytest.mark.parametrize("counts", [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_those_of_an_attempt_meet_whatever_their_nodes_count(port, counts) -> None:
    """torchrun counts a restart on the node whose process failed, and on another only where one failed there too."""
    _meet(port, (0, 0))
    _meet(port, counts)


def test_one_that_died_while_it_waited_for_the_others_keeps_nobody_waiting(port) -> None:
    store = dist.PrefixStore("glm_training", dist.TCPStore("127.0.0.1", port, is_master=False))
    waiting = FORK.Process(target=_ask, args=(_variables(port, 1, 0),))
    waiting.start()
    while store.add("asked", 0) == 0:
        time.sleep(0.01)
    waiting.kill()
    waiting.join()
    store.add("asked", 1)  # and one that died before it said its name
    _meet(port, (0, 0))


def test_a_process_too_many_hears_why_nothing_starts(port) -> None:
    """Rank 2 of three, where rank 0 was started as one of two: it is asked nothing, and still told."""
    told = FORK.Queue()

    def start(rank: int, size: int) -> None:
        os.environ.update(_variables(port, rank, 0) | {"WORLD_SIZE": str(size)})
        try:
            init_world(True, "gloo", "cpu")
        except launch.DistributedError as error:
            told.put((rank, "rank 0 was started as one of 2 processes" in str(error)))

    group = [FORK.Process(target=start, args=(rank, size)) for rank, size in ((0, 2), (1, 3), (2, 3))]
    for process in group:
        process.start()
    assert sorted(told.get(timeout=30) for _ in group) == [(0, True), (1, True), (2, True)]
    for process in group:
        process.join()
