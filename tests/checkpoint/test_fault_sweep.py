"""A full save, pipeline and adapters included, disturbed at every change that it makes to the disk; of a run in shards
too, with what torch.distributed.checkpoint changes there. A save by two processes: tests/parity/faults.py.

After each fault the run's checkpoint verifies and is byte for byte one that an undisturbed run makes, and nobody has
seen a traceback; now and then a run goes on from it, to the same weights as the undisturbed one.

The suite tries a few places of each. All of them, with their count:

    FAULT_SWEEP=all pytest -n 0 -s tests/checkpoint/test_fault_sweep.py
"""

from __future__ import annotations

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
import torch.distributed as dist

from glm_training.checkpoint.manifest import read_manifest
from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.engine.errors import TrainingError
from glm_training.engine.run_directory import held_run_directory
from glm_training.engine.sharding import Shards, Strategy
from glm_training.trainers import base_trainer
from glm_training.trainers.base_trainer import BaseTrainer
from tests.faulty_saves import FAULTS, OF_SHARDS, Change, digests, fault, places, step
from tests.faulty_system import KILLED, FaultySystem, in_child
from tests.runs import trainer_of

RUNS = {
    "LoRA": ["lora.enabled=true", "lora.rank=2", "checkpoint.save_lora=true", "training.optimizer=adamw"],
    "full": ["model.component=dit"],
    "shards": OF_SHARDS,
}
ALL = os.environ.get("FAULT_SWEEP") == "all"
PLACES = 3
"""How many places the suite tries of each fault."""


@dataclass
class Saving:
    """A run of a kind that is about to save its second step, in the state `pristine` of its folder; what each change
    will be, and the digests of the files of the checkpoints that an undisturbed run makes."""

    kind: str
    trainer: BaseTrainer
    run: Path
    pristine: Path
    changes: list[Change]
    files: dict[int, dict[str, str]]

    def restore(self) -> None:
        """As before the save. Files are linked: a save replaces them, and changes none in place."""
        shutil.rmtree(self.run)
        shutil.copytree(self.pristine, self.run, copy_function=os.link)


def built(kind: str, folder: Path) -> BaseTrainer:
    """The trainer of a run; for one in shards, in a group of this process alone."""
    keys = ["training.use_reward=false", "checkpoint.save_total_limit=1", *RUNS[kind]]
    if kind != "shards":
        return trainer_of(folder, *keys)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:  # one process alone has nothing to choose
        patch.setattr(base_trainer, "choose", lambda config, family, world: Strategy(Shards(config, world)))
        return trainer_of(folder, *keys)


@pytest.fixture(scope="module", params=RUNS)
def saving(request, tmp_path_factory):
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    with ExitStack() as run_of:
        run_of.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # as the forks have: other numbers of threads sum in another order
        trainer = built(kind, folder)
        directory = run_of.enter_context(held_run_directory(trainer.config, trainer.world, lambda: None))
        trainer._open(directory)
        run_of.enter_context(trainer.logger)
        run, files = folder / "run", {}
        step(trainer, 1)
        trainer.save()
        files[1] = digests(run / "checkpoints" / "step-000001")
        shutil.copytree(run, folder / "pristine")
        step(trainer, 2)
        if kind == "shards":  # gloo's threads do not live on in a fork, which begins a group of the same names
            dist.destroy_process_group()
        subject = Saving(kind, trainer, run, folder / "pristine", [], files)
        assert in_child(folder / "told", lambda: saved(subject, folder, lambda *_: None)) == 0
        subject.changes = [(each, place) for each, place in json.loads((folder / "changes").read_text())]
        files[2] = digests(run / "checkpoints" / "step-000002")
        assert continued(subject, folder / "told") == 0
        files[3] = digests(run / "checkpoints" / "step-000003")
        yield subject


def saved(subject: Saving, folder: Path, decide: Callable[[int, str, str], str | None]) -> int:
    """The save of the second step, with its changes seen by `decide`; 1 where it fails as the user is to see it."""
    if subject.kind == "shards":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.new_group()
    with FaultySystem(subject.run, decide).interposed() as system:
        try:
            subject.trainer.save()
        except TrainingError as error:
            print(error, file=sys.stderr)
            return 1
    (folder / "changes").write_text(json.dumps(system.operations))
    return 0


def continued(subject: Saving, told: Path) -> int:
    """`gone_on`, in a fork; in shards by another trainer, as the backward pass of shards does not bear a fork."""
    if subject.kind != "shards":
        return in_child(told, lambda: gone_on(subject, subject.trainer))
    trainer = built("shards", subject.run.parent)
    trainer.directory, trainer.logger = subject.trainer.directory, subject.trainer.logger
    code = gone_on(subject, trainer)
    dist.destroy_process_group()
    return code


def gone_on(subject: Saving, trainer: BaseTrainer) -> int:
    """A resume, to a third step and its save."""
    point = resolve_resume(subject.run / "checkpoints", "latest")
    trainer.load(load_checkpoint(point.path))
    assert trainer.step == point.step
    step(trainer, 3)
    trainer.save()
    left = sorted(path.name for path in (subject.run / "checkpoints").iterdir())
    assert [name for name in left if name.startswith((".", "step"))] == ["step-000003"], left
    assert not list(subject.run.glob("lora/.partial-*"))
    return 0


def tried(changes: list[Change], kind: str) -> list[int]:
    """The changes at which a fault is tried."""
    possible = places(changes, kind)
    if ALL:
        return possible
    spread = len(possible) / PLACES
    first = FAULTS.index(kind) / len(FAULTS)  # others than those of the other faults
    return [possible[int((first + place) * spread)] for place in range(PLACES)]


@pytest.mark.parametrize("kind", FAULTS)
def test_no_fault_takes_the_checkpoint(saving, tmp_path, kind):
    outcomes: Counter[str] = Counter()
    for place in tried(saving.changes, kind):
        saving.restore()
        code = in_child(tmp_path / "told", lambda place=place: saved(saving, tmp_path, fault(kind, place)))
        told = (tmp_path / "told").read_text()
        where = f"{kind} at change {place}, {saving.changes[place]}: {told}"
        expected = {"kill": {KILLED}, "torn write": {KILLED}, "lost write": {1}}
        assert code in expected.get(kind, {0, 1}), where
        assert "Traceback" not in told and "Exception ignored" not in told, where
        checkpoints = saving.run / "checkpoints"
        point = resolve_resume(checkpoints, "latest")
        assert digests(point.path) == saving.files[point.step], where
        assert point.step == 2 or code != 0, where
        assert code != 1 or "the previous checkpoint is untouched" in told, where
        assert code != 1 or kind == "lost write" or "checkpoint of step 2" in told, where
        read_manifest(checkpoints / (checkpoints / "latest").read_text().strip())
        outcomes[f"exit {code}, step {point.step}"] += 1
        if sum(outcomes.values()) % (25 if ALL else PLACES) == 0:
            assert continued(saving, tmp_path / "told") == 0, where + (tmp_path / "told").read_text()
            assert digests(checkpoints / "step-000003") == saving.files[3], where
    print(f"\n{kind}: {sum(outcomes.values())} of {len(saving.changes)} changes of a save; {dict(outcomes)}")
