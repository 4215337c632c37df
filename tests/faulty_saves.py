"""Faults of a disk while a save changes it, one by one: what they are, where each can happen, and what to hold the
checkpoint against that is left."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.kill import tensors_digest
from glm_training.checkpoint.manifest import verify_checkpoint
from glm_training.trainers.base_trainer import BaseTrainer
from tests.faulty_system import KILLED, TAKES_SPACE

FAULTS = ("kill", "torn write", "ENOSPC", "EIO", "lost write")
"""The process is killed before the change; killed half-way through a write; the disk is full from there on; the change
fails once with an I/O error (a write half-way through); half of a write to the states is lost, and nobody told."""
OF_SHARDS = (
    "training.use_reward=false",
    "checkpoint.save_total_limit=1",
    "model.component=dit",
    "lora.enabled=true",
    "lora.rank=2",
    "checkpoint.save_lora_only=true",
    "training.optimizer=adamw",
    "training.ema.decay=0.5",
)
"""A run whose adapters, their average and their moments lie in shards."""

Change = tuple[str, str]
"""A change of the disk, as FaultySystem names it, and the path below the run's folder."""


def fault(kind: str, at: int) -> Callable[[int, str, str], str | None]:
    """What becomes of each change when the fault is met at change number `at`."""
    code = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}.get(kind)

    def decide(number: int, change: str, path: str) -> str | None:
        if number < at or (number > at and kind != "ENOSPC"):
            return None
        if change == "write" and number == at and kind != "kill":
            return "torn"
        if kind == "lost write":
            return "lost"
        if code is None:
            os._exit(KILLED)
        if kind == "EIO" or change in TAKES_SPACE | {"torn"}:
            raise OSError(code, os.strerror(code), path)
        return None

    return decide


def places(changes: Sequence[Change], kind: str) -> list[int]:
    """The changes at which a fault of the kind can happen."""
    writes = [(at, path) for at, (change, path) in enumerate(changes) if change == "write"]
    return {
        "torn write": [at for at, _ in writes],
        "lost write": [at for at, path in writes if "/states/" in path],
    }.get(kind, list(range(len(changes))))


def digests(checkpoint: Path) -> dict[str, str]:
    """Of the bytes of each file; of shards those of the tensors, as the order of their notes is left to chance."""
    files = verify_checkpoint(checkpoint).files
    shards = [name for name in files if name.startswith("states/") and name.count("/") > 1]
    return {name: record.sha256 for name, record in files.items()} | {
        name: tensors_digest(checkpoint / name) for name in shards
    }


def step(trainer: BaseTrainer, until: int) -> None:
    """Its training steps up to that one, without what the loop does after each."""
    while trainer.step < until:
        trainer.training_step()
        trainer.step += 1
