"""A save of shards by two processes, with a fault of the disk in one of them, at every change that this one makes.

    python -m tests.parity.faults --out benchmarks/results/faults.json

After each fault nobody hangs, whoever is left says why in one message, and the run's folder has a whole checkpoint, the
one before or the new one, tensor for tensor that of an undisturbed run. After every 25th two new processes go on from
it, to the weights of the undisturbed run. The faults: `tests/faulty_saves.py`. `--every 4` tries each fourth place. The
file is written after each fault, and what stands in it already is not tried again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.quickstart import machine
from glm_training.checkpoint.resume import resolve_resume
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.engine.agreement import losses_explained
from glm_training.engine.errors import TrainingError
from glm_training.engine.run_directory import held_run_directory
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, barrier, init_world, shutdown
from glm_training.utils.folder_lock import LOCK
from tests.faulty_saves import FAULTS, OF_SHARDS, Change, digests, fault, places, step
from tests.faulty_system import KILLED, FaultySystem, in_child
from tests.runs import trainer_of, write_config
from tests.warm import free_port

KEYS = (*OF_SHARDS, "distributed.strategy=fsdp", "training.batch_size=1")
FORK = multiprocessing.get_context("fork")
LIMIT = 60.0
"""Seconds after which processes that save have not ended but hang."""
GO_ON = 25

Fault = tuple[str, int, int]
"""Kind, rank, and number of the change."""


@dataclass(frozen=True)
class Asked:
    """A save, with the fault of one rank or undisturbed. folder: where ranks write what they tell, and which changes
    they make."""

    port: int
    folder: Path
    fault: Fault | None


def join(rank: int, port: int) -> World:
    """The two processes as one run."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return init_world(True, "gloo")


# -- the two processes -------------------------------------------------------------------------------------------------


def keep(folder: Path, rank: int, port: int, pipe: Any) -> None:
    """One of the two: trains to the second step, whose save its forks then try, as often as it is asked."""
    world = join(rank, port)
    trainer = trainer_of(folder, *KEYS, world=world)
    with held_run_directory(trainer.config, world, lambda: None) as directory:
        trainer._open(directory)
        with trainer.logger:
            step(trainer, 1)
            trainer.save()
            barrier(world)
            if rank == 0:
                shutil.copytree(folder / "run", folder / "pristine")
            step(trainer, 2)
            shutdown(world)  # gloo's threads do not live on in a fork, which begins a group of the same names
            pipe.send(rank)
            while True:
                asked = pipe.recv()
                told = asked.folder / f"told-{rank}"
                pipe.send(in_child(told, partial(saved, trainer, asked), LIMIT))


def saved(trainer: BaseTrainer, asked: Asked) -> int:
    """The save of the second step; 1 where it fails, as the user is to see it."""
    rank = trainer.world.rank
    join(rank, asked.port)
    dist.new_group()
    kind, other, place = asked.fault or ("kill", rank, -1)  # before the first one: never
    decide = fault(kind, place) if other == rank else _nothing
    with FaultySystem(trainer.config.output_dir, decide).interposed() as system:
        try:
            with losses_explained(trainer.world):  # as around every run
                trainer.save()
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    (asked.folder / f"changes-{rank}").write_text(json.dumps(system.operations))
    return 0


def _nothing(number: int, change: str, path: str) -> None:
    """Of the other rank every change is made."""


def go_on(folder: Path, rank: int, port: int) -> int:
    """A resume by new processes in a copy of the run, to a third step and its save."""
    world = join(rank, port)
    keys = [*KEYS, f"output_dir={folder}/again", "checkpoint.resume_from=latest"]
    trainer = trainer_of(folder, *keys, world=world)
    with held_run_directory(trainer.config, world, lambda: trainer.resume) as directory:
        trainer._open(directory)
        with trainer.logger:
            step(trainer, 3)
            trainer.save()
    return 0


# -- what asks them ----------------------------------------------------------------------------------------------------


class Pair:
    """The two processes, the folder `run` of theirs, and what an undisturbed run makes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        write_config(folder)
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in (0, 1):
            here, there = FORK.Pipe()
            process = FORK.Process(target=keep, args=(folder, rank, port, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        assert [pipe.recv() for pipe in self._pipes] == [0, 1]
        checkpoints = self.run / "checkpoints"
        self.files = {1: digests(checkpoints / "step-000001")}
        assert self.save(None) == [0, 0], self.told()
        self.changes: list[list[Change]] = [
            [(change, path) for change, path in json.loads((folder / f"changes-{rank}").read_text())] for rank in (0, 1)
        ]
        self.files[2] = digests(checkpoints / "step-000002")
        self.files[3] = self.resumed()

    def save(self, given: Fault | None) -> list[int | None]:
        """How the two end that save the second step."""
        shutil.rmtree(self.run)
        shutil.copytree(self.folder / "pristine", self.run, copy_function=os.link)  # no file is changed in place
        asked = Asked(free_port(), self.folder, given)
        for pipe in self._pipes:
            pipe.send(asked)
        return [pipe.recv() for pipe in self._pipes]

    def told(self) -> list[str]:
        """What each wrote."""
        return [(self.folder / f"told-{rank}").read_text() for rank in (0, 1)]

    def resumed(self) -> dict[str, str]:
        """The files of the third step, to which two new processes go on from what is left; nothing else stays. Raises
        AssertionError where they do not come to it."""
        again = self.folder / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(self.run, again, ignore=shutil.ignore_patterns(LOCK))  # which is held
        port = free_port()
        group = [FORK.Process(target=went_on, args=(self.folder, rank, port)) for rank in (0, 1)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [0, 0], "\n".join(self.told())
        left = sorted(path.name for path in (again / "checkpoints").iterdir())
        assert [name for name in left if name.startswith((".", "step"))] == ["step-000003"], left
        return digests(again / "checkpoints/step-000003")

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def went_on(folder: Path, rank: int, port: int) -> None:
    """`go_on`, with what it tells in a file."""
    sys.exit(in_child(folder / f"told-{rank}", partial(go_on, folder, rank, port), LIMIT) != 0)


def wrong(pair: Pair, given: Fault, codes: list[int | None]) -> tuple[str, list[str]]:
    """What became of the two and of the checkpoint, and what is wrong with that."""
    kind, rank, place = given
    told, found = pair.told(), list[str]()
    where = f"{kind} on rank {rank} at change {place}, {' '.join(pair.changes[rank][place])}"
    killed = kind in ("kill", "torn write")
    if None in codes:
        found.append(f"{where}: rank {codes.index(None)} hangs")
    if codes[rank] not in ((KILLED,) if killed else (1,) if kind == "lost write" else (0, 1)):
        found.append(f"{where}: rank {rank} ended with {codes[rank]}: {told[rank]}")
    if codes[1 - rank] not in (0, 1) or (not killed and codes[0] != codes[1]):
        found.append(f"{where}: the other ended with {codes[1 - rank]}: {told[1 - rank]}")
    for number, text in enumerate(told):
        errors = sum(line.startswith("error: ") for line in text.splitlines())
        if "Traceback" in text or "Exception ignored" in text or errors != (codes[number] == 1):
            found.append(f"{where}: rank {number} tells: {text}")
    if codes == [1, 1] and (told[0] != told[1] or "previous checkpoint is untouched" not in told[0]):
        found.append(f"{where}: they tell {told[0]} and {told[1]}")
    checkpoints = pair.run / "checkpoints"
    try:
        point = resolve_resume(checkpoints, "latest")
    except CheckpointError as error:
        return "no whole checkpoint", [*found, f"{where}: {error}"]
    if digests(point.path) != pair.files[point.step]:
        found.append(f"{where}: step {point.step} is not that of the undisturbed run")
    if point.step != 2 and 0 in codes:
        found.append(f"{where}: a rank ended well without the new checkpoint")
    return f"exit {codes[0]} and {codes[1]}, step {point.step}", found


def sweep(out: Path, every: int) -> dict[str, Any]:
    """Tries each `every`th fault; what `out` has of an earlier run with the same changes is kept."""
    with tempfile.TemporaryDirectory() as name:
        pair = Pair(Path(name))
        try:
            every_fault = [
                (kind, rank, place) for rank in (0, 1) for kind in FAULTS for place in places(pair.changes[rank], kind)
            ]
            chosen = every_fault[every // 2 :: every]
            report = begun(out, pair, len(every_fault), every)
            for number, given in enumerate(chosen[report["tried"] :], start=report["tried"] + 1):
                tried(pair, given, report, last=number == len(chosen))
                out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                print(f"{number}/{len(chosen)} {report['seconds']:.0f} s, {len(report['wrong'])} wrong", flush=True)
        finally:
            pair.end()
    return report


def begun(out: Path, pair: Pair, possible: int, every: int) -> dict[str, Any]:
    """What `out` has, where it is of the same faults; else a new report."""
    about = {
        "benchmark": "faults",
        "machine": machine(),
        "torch": torch.__version__,
        "changes": {f"rank {rank}": len(changes) for rank, changes in enumerate(pair.changes)},
        "possible": possible,
        "every": every,
    }
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        if about.items() <= found.items():
            return found
    return about | {"tried": 0, "went_on": 0, "seconds": 0.0, "longest": 0.0, "outcomes": {}, "wrong": []}


def tried(pair: Pair, given: Fault, report: dict[str, Any], last: bool) -> None:
    """One fault, into the report."""
    started = time.monotonic()
    codes = pair.save(given)
    ended = time.monotonic() - started
    outcome, found = wrong(pair, given, codes)
    report["tried"] += 1
    if not found and (last or report["tried"] % GO_ON == 0):
        report["went_on"] += 1
        if pair.resumed() != pair.files[3]:
            found.append(f"{given}: two that go on from there come to other weights")
    counted = report["outcomes"].setdefault(f"{given[0]} on rank {given[1]}", {})
    counted[outcome] = counted.get(outcome, 0) + 1
    report["wrong"] += found
    report["seconds"] = round(report["seconds"] + time.monotonic() - started, 1)
    report["longest"] = round(max(report["longest"], ended), 1)


def main() -> None:
    """Exits with 1 where something was not as it ought to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of so many faults, spread evenly")
    args = parser.parse_args()
    report = sweep(args.out, args.every)
    print("\n".join(report["wrong"]) or "all recovered")
    raise SystemExit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
