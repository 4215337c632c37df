"""How the processes of one run find each other, and why they do not start together."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long processes wait for each other at the start."""

FAULT_TIMEOUT = timedelta(seconds=30)
"""The same where one of them cannot start: the others may have something to say as well."""

_PAUSE_SECONDS = 0.01

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where MPI's launchers say how many processes they started."""


class DistributedError(RuntimeError):
    """The launch environment and the configuration do not fit together; the message names the remedy."""


@dataclass(frozen=True)
class Launch:
    """What the launcher put in the environment. ``address`` is None when torchrun's own variables are complete."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None = None


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise DistributedError(
            f"the environment variable {name} is {text!r}, not a number; start several processes with "
            "`torchrun --nproc-per-node N ...`, which sets it"
        ) from None


def read_launch() -> Launch:
    """Rank and sizes from torchrun's variables, else from Slurm's, else one process.

    Raises DistributedError for variables that contradict each other, and where a launcher started several processes
    without a way to find each other: each would train alone, in one folder.
    """
    if "WORLD_SIZE" in os.environ:
        world_size = _integer("WORLD_SIZE")
        default = 0 if world_size == 1 else None
        rank = _integer("RANK", default)
        if not 0 <= rank < world_size:
            raise DistributedError(f"RANK is {rank} and WORLD_SIZE {world_size}: ranks count from 0; use `torchrun`")
        return Launch(rank, world_size, _integer("LOCAL_RANK", default))
    if _integer("SLURM_NTASKS", 1) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise DistributedError(
                f"Slurm started {os.environ['SLURM_NTASKS']} tasks, but MASTER_ADDR is not set, so each would train "
                'alone; export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" before srun. '
                "For one process within such a job: WORLD_SIZE=1 python ..."
            )
        address = f"tcp://{os.environ['MASTER_ADDR']}:{_integer('MASTER_PORT', 29500)}"
        return Launch(_integer("SLURM_PROCID"), _integer("SLURM_NTASKS"), _integer("SLURM_LOCALID"), address=address)
    for name in MPI_SIZES:
        if _integer(name, 1) > 1:
            raise DistributedError(
                f"an MPI launcher started {os.environ[name]} processes ({name}), but WORLD_SIZE is not set, so each "
                "would train alone; start with `torchrun --nproc-per-node N ...`, or with WORLD_SIZE=1 for one process"
            )
    return Launch(0, 1, 0)


def meet(launch: Launch, backend: str) -> dist.Store:
    """Waits for the run's other processes; the store that they share.

    Raises DistributedError, on every process, where one is missing, cannot start, expects another number of them, or
    would speak another `backend`.
    """
    if not _has_address(launch):
        raise DistributedError("WORLD_SIZE is set, but MASTER_ADDR or MASTER_PORT is not; start with `torchrun`")
    store, problems = _hello(_store(launch), launch, backend, None)
    if problems:
        raise DistributedError(_cannot_start(problems))
    return store


def announce_fault(fault: str) -> None:
    """Tell the run's other processes, if there are any, that this one cannot start and why, in place of `init_world`:
    they would wait for it.

    Returns where all of them have the same fault. Raises DistributedError, on every process, where they differ.
    """
    launch = read_launch()
    if launch.world_size == 1 or not _has_address(launch):
        return
    problems = _hello(_store(launch), launch, "", fault)[1]
    if problems != [fault]:
        raise DistributedError(_cannot_start(problems))


def _cannot_start(problems: Sequence[str]) -> str:
    lines = [f"  {problem}".replace("\n", "\n  ") for problem in problems]
    return "\n".join(["the processes of this run do not fit together, and nothing was started:", *lines])


def _has_address(launch: Launch) -> bool:
    return launch.address is not None or ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ)


def _store(launch: Launch) -> dist.Store:
    """Where the processes find each other: kept by torchrun, or by the first of them."""
    address = launch.address or f"tcp://{os.environ['MASTER_ADDR']}:{_integer('MASTER_PORT')}"
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    keeps = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, int(port), is_master=keeps, timeout=JOIN_TIMEOUT, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {launch.rank} cannot {'open' if keeps else 'reach'} {host}:{port}, where the processes meet "
            f"({_first_line(error)}); check MASTER_ADDR, and take a free port for MASTER_PORT"
        ) from error
    return dist.PrefixStore("glm_training", store)


def _hello(store: dist.Store, launch: Launch, backend: str, fault: str | None) -> tuple[dist.Store, list[str]]:
    """The store of this attempt, and what keeps the processes from starting together, the same on each; empty when
    nothing does.

    Each says how many processes it expects, what it would speak, and whether it cannot start. The first one judges.
    This comes before the process group: under another backend, or for want of a process, that waits without a word.

    torchrun's store outlives an attempt, with all that was said in it, and its count of restarts is no name for one: a
    node whose processes were stopped for another node's sake does not count. So rank 0 gives each attempt a name, and
    tells it to whoever asks under a name that nobody had before: those of an attempt before do not hear it.
    """
    told = json.dumps({"world_size": launch.world_size, "backend": backend, "fault": fault})
    return _lead(store, launch, told) if launch.rank == 0 else _follow(store, launch, told, fault)


def _lead(store: dist.Store, launch: Launch, told: str) -> tuple[dist.Store, list[str]]:
    name = uuid.uuid4().hex
    attempt, answers = dist.PrefixStore(name, store), _Answers(store, name)
    attempt.set("hello/0", told)
    problems = _judge(attempt, answers, launch.world_size)
    attempt.set("verdict", json.dumps(problems))
    said = [f"hello/{rank}" for rank in range(launch.world_size) if attempt.check([f"hello/{rank}"])]
    others = max(json.loads(attempt.get(key))["world_size"] for key in said) - 1
    deadline = time.monotonic() + FAULT_TIMEOUT.total_seconds() / 3
    while problems and attempt.add("heard", 0) < others and time.monotonic() < deadline:
        answers.give()
        time.sleep(_PAUSE_SECONDS)  # the store may end with this process
    return attempt, problems


def _follow(store: dist.Store, launch: Launch, told: str, fault: str | None) -> tuple[dist.Store, list[str]]:
    own = uuid.uuid4().hex
    patience = 2 * FAULT_TIMEOUT if fault else JOIN_TIMEOUT + FAULT_TIMEOUT
    try:
        store.set(f"asks/{store.add('asked', 1)}", own)
        store.wait([f"attempt/{own}"], patience)
        attempt = dist.PrefixStore(store.get(f"attempt/{own}").decode(), store)
        attempt.set(f"hello/{launch.rank}", told)
        attempt.wait(["verdict"], patience)
        problems = json.loads(attempt.get("verdict"))
    except RuntimeError as error:
        if fault is not None:
            return store, [fault, f"rank {launch.rank} heard nothing of rank 0"]
        raise DistributedError(f"rank {launch.rank} heard nothing of rank 0 ({_first_line(error)})") from error
    attempt.add("heard", 1)
    return attempt, problems


class _Answers:
    """Rank 0 tells the others the attempt's `name`. Those of earlier attempts that have asked are told it in vain."""

    def __init__(self, store: dist.Store, name: str) -> None:
        self._store, self._name = store, name
        self._asked, self._open = 0, set[int]()

    def give(self) -> None:
        """Answers all that have asked by now."""
        asked = self._store.add("asked", 0)
        self._open |= set(range(self._asked + 1, asked + 1))
        self._asked = asked
        for number in sorted(self._open):
            if self._store.check([f"asks/{number}"]):  # else it is about to ask, or died there
                self._store.set(f"attempt/{self._store.get(f'asks/{number}').decode()}", self._name)
                self._open.discard(number)


def _judge(attempt: dist.Store, answers: _Answers, world_size: int) -> list[str]:
    """Rank 0's verdict on what all have said. It waits for each, but not long once one cannot start."""
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    hellos: dict[int, dict[str, Any]] = {}
    missing = []
    for rank in range(world_size):
        while not attempt.check([f"hello/{rank}"]) and time.monotonic() < deadline:
            answers.give()
            time.sleep(_PAUSE_SECONDS)
        if not attempt.check([f"hello/{rank}"]):
            missing.append(rank)
            continue
        hello = json.loads(attempt.get(f"hello/{rank}"))
        if hello["world_size"] != world_size:
            return [
                f"rank 0 was started as one of {world_size} processes (WORLD_SIZE), rank {rank} as one of "
                f"{hello['world_size']}: start all with the same number"
            ]
        hellos[rank] = hello
        if hello["fault"] is not None:
            deadline = min(deadline, time.monotonic() + FAULT_TIMEOUT.total_seconds())
    faults = {rank: hello["fault"] for rank, hello in hellos.items() if hello["fault"] is not None}
    if len(faults) == world_size and len(set(faults.values())) == 1:
        return [faults[0]]
    if faults:
        return [f"rank {rank}: {fault}" for rank, fault in faults.items()]
    if missing:
        ranks = ", ".join(map(str, missing))
        minutes = JOIN_TIMEOUT.total_seconds() / 60
        return [f"of {world_size} processes these did not come within {minutes:g} minutes: rank {ranks}; start all"]
    return [
        f"rank 0 speaks {hellos[0]['backend']}, rank {rank} {hello['backend']}: give all the same devices "
        "(model.device_map) and the same distributed.backend"
        for rank, hello in hellos.items()
        if hello["backend"] != hellos[0]["backend"]
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
