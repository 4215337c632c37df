"""A full save, pipeline and adapters included, disturbed at every change that it makes to the disk.

Faults: the process is killed before the change; killed half-way through a write; the disk is full from there on; the
change fails once with an I/O error (a write half-way through). After each the run's checkpoint verifies and is byte for
byte one that an undisturbed run makes, and nobody has seen a traceback; now and then a run goes on from it, to the
same weights as the undisturbed one.

The suite tries a few places of each. All of them, with their count:

    FAULT_SWEEP=all pytest -n 0 -s tests/checkpoint/test_fault_sweep.py
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from glm_training.checkpoint.manifest import read_manifest, verify_checkpoint
from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.engine.errors import TrainingError
from glm_training.engine.run_directory import held_run_directory
from glm_training.trainers.base_trainer import BaseTrainer
from tests.faulty_system import KILLED, TAKES_SPACE, FaultySystem, in_child
from tests.runs import trainer_of

FAULTS = ("kill", "torn write", "ENOSPC", "EIO")
RUNS = {
    "LoRA": ["lora.enabled=true", "lora.rank=2", "checkpoint.save_lora=true", "training.optimizer=adamw"],
    "full": ["model.component=dit"],
}
ALL = os.environ.get("FAULT_SWEEP") == "all"
PLACES = 5
"""How many places the suite tries of each fault."""


@dataclass
class Saving:
    """A run that is about to save its second step, in the state `pristine` of its folder; what each change will be, and
    the digests of the files of the checkpoints that an undisturbed run makes."""

    trainer: BaseTrainer
    run: Path
    pristine: Path
    changes: list[tuple[str, str]]
    files: dict[int, dict[str, str]]

    def restore(self) -> None:
        """As before the save. Files are linked: a save replaces them, and changes none in place."""
        shutil.rmtree(self.run)
        shutil.copytree(self.pristine, self.run, copy_function=os.link)


def step(trainer: BaseTrainer, until: int) -> None:
    while trainer.step < until:
        trainer.training_step()
        trainer.step += 1


def digests(checkpoint: Path) -> dict[str, str]:
    return {name: record.sha256 for name, record in verify_checkpoint(checkpoint).files.items()}


@pytest.fixture(scope="module", params=RUNS)
def saving(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    trainer = trainer_of(folder, "training.use_reward=false", "checkpoint.save_total_limit=1", *RUNS[request.param])
    with ExitStack() as run_of:
        run_of.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # as the forks have: other numbers of threads sum in another order
        directory = run_of.enter_context(held_run_directory(trainer.config, trainer.world, lambda: None))
        trainer._open(directory)
        run_of.enter_context(trainer.logger)
        run, files = folder / "run", {}
        step(trainer, 1)
        trainer.save()
        files[1] = digests(run / "checkpoints" / "step-000001")
        shutil.copytree(run, folder / "pristine")
        step(trainer, 2)
        subject = Saving(trainer, run, folder / "pristine", [], files)
        assert in_child(folder / "told", lambda: saved(subject, folder, lambda *_: None)) == 0
        subject.changes = [(each, place) for each, place in json.loads((folder / "changes").read_text())]
        files[2] = digests(run / "checkpoints" / "step-000002")
        assert in_child(folder / "told", lambda: gone_on(subject)) == 0
        files[3] = digests(run / "checkpoints" / "step-000003")
        yield subject


def saved(subject: Saving, folder: Path, decide: Callable[[int, str, str], str | None]) -> int:
    """The save of the second step, with its changes seen by `decide`; 1 where it fails as the user is to see it."""
    with FaultySystem(subject.run, decide).interposed() as system:
        try:
            subject.trainer.save()
        except TrainingError as error:
            print(error, file=sys.stderr)
            return 1
    (folder / "changes").write_text(json.dumps(system.operations))
    return 0


def gone_on(subject: Saving) -> int:
    """A resume, to a third step and its save."""
    point = resolve_resume(subject.run / "checkpoints", "latest")
    subject.trainer.load(load_checkpoint(point.path))
    assert subject.trainer.step == point.step
    step(subject.trainer, 3)
    subject.trainer.save()
    left = sorted(path.name for path in (subject.run / "checkpoints").iterdir())
    assert [name for name in left if name.startswith((".", "step"))] == ["step-000003"], left
    assert not list(subject.run.glob("lora/.partial-*"))
    return 0


def fault(kind: str, at: int) -> Callable[[int, str, str], str | None]:
    """What becomes of each change when the fault is met at change number `at`."""
    code = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}.get(kind)

    def decide(number: int, change: str, path: str) -> str | None:
        if number < at or (number > at and kind != "ENOSPC"):
            return None
        if change == "write" and number == at and kind != "kill":
            return "torn"
        if code is None:
            os._exit(KILLED)
        if kind == "EIO" or change in TAKES_SPACE | {"torn"}:
            raise OSError(code, os.strerror(code), path)
        return None

    return decide


def places(changes: list[tuple[str, str]], kind: str) -> list[int]:
    """The changes at which a fault is tried."""
    possible = [at for at, (change, _) in enumerate(changes) if change == "write" or kind != "torn write"]
    if ALL:
        return possible
    spread = len(possible) / PLACES
    first = FAULTS.index(kind) / len(FAULTS)  # others than those of the other faults
    return [possible[int((first + place) * spread)] for place in range(PLACES)]


@pytest.mark.parametrize("kind", FAULTS)
def test_no_fault_takes_the_checkpoint(saving, tmp_path, kind):
    outcomes: Counter[str] = Counter()
    for place in places(saving.changes, kind):
        saving.restore()
        code = in_child(tmp_path / "told", lambda place=place: saved(saving, tmp_path, fault(kind, place)))
        told = (tmp_path / "told").read_text()
        where = f"{kind} at change {place}, {saving.changes[place]}: {told}"
        assert code in ({KILLED} if kind in ("kill", "torn write") else {0, 1}), where
        assert "Traceback" not in told and "Exception ignored" not in told, where
        checkpoints = saving.run / "checkpoints"
        point = resolve_resume(checkpoints, "latest")
        assert digests(point.path) == saving.files[point.step], where
        assert point.step == 2 or code != 0, where
        assert code != 1 or ("the previous checkpoint is untouched" in told and "checkpoint of step 2" in told), where
        read_manifest(checkpoints / (checkpoints / "latest").read_text().strip())
        outcomes[f"exit {code}, step {point.step}"] += 1
        if sum(outcomes.values()) % (10 if ALL else PLACES) == 0:
            assert in_child(tmp_path / "told", lambda: gone_on(saving)) == 0, where + (tmp_path / "told").read_text()
            assert digests(checkpoints / "step-000003") == saving.files[3], where
    print(f"\n{kind}: {sum(outcomes.values())} of {len(saving.changes)} changes of a save; {dict(outcomes)}")
