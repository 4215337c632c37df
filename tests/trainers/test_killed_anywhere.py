"""A run that is stopped or killed in any of its phases, and goes on, logs line for line what one logs that nobody
disturbed, and its files are the same bytes.

The suite tries a part. Every signal in every phase, early, midway and late, of each trainer; and kills at every change
that a run makes to its files (this takes hours):

    KILLS=phases pytest -n 0 -s tests/trainers/test_killed_anywhere.py
    KILLS=changes pytest -n 0 -s tests/trainers/test_killed_anywhere.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from glm_training.checkpoint import disk
from glm_training.cli.stopping import stoppable
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.evaluations import Evaluations
from glm_training.engine.figures import is_timed
from glm_training.engine.parts import Part
from glm_training.engine.run_directory import chosen_point
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.dmdr_trainer import DMDRTrainer
from glm_training.trainers.dpo_trainer import DPOTrainer
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.trainers.supervised_terms import GLMTerms
from glm_training.trainers.vgt_autoencoder_trainer import VGTAutoencoderTrainer
from glm_training.trainers.vgt_generator_trainer import VGTGeneratorTrainer
from glm_training.utils.metrics_file import SESSIONS
from glm_training.utils.step_lines import StepLines
from tests import dmdr_runs, preference_runs, runs, vgt_runs
from tests.faulty_system import KILLED, FaultySystem, in_child

SHARED = [
    "checkpoint.resume_from=auto",
    "training.max_steps=3",
    "training.batch_size=1",
    "logging.log_interval=2",
    "logging.save_interval=2",
    "logging.eval_interval=2",
    "logging.log_images=true",
    "logging.num_log_images=1",
    "evaluation.num_eval_samples=1",
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WHICH = os.environ.get("KILLS", "")


def reward(folder: Path) -> BaseTrainer:
    small = ["model.component=dit", "reward.grpo.num_samples=2", "evaluation.enabled=true", "lora.enabled=true"]
    return runs.trainer_of(folder, *SHARED, *small, "checkpoint.save_lora_only=true")


def supervised(folder: Path) -> BaseTrainer:
    return runs.trainer_of(folder, *SHARED, "training.use_reward=false", "reward.enabled=false")


def preference(folder: Path) -> BaseTrainer:
    held_out = f"evaluation.eval_pairs={preference_runs.write_pairs(folder / 'held_out', bright=True)}"
    own_cache = f"dpo.cache_dir={folder}/run/cache"
    return preference_runs.trainer_of(folder, "sdxl", *SHARED, held_out, own_cache)


def distillation(folder: Path) -> BaseTrainer:
    return dmdr_runs.trainer_of(folder, *SHARED, "lora.enabled=true", "checkpoint.save_lora_only=true")


def autoencoder(folder: Path) -> BaseTrainer:
    adversary = ["vgt.gan.start_step=1", "vgt.gan.channels=32", "vgt.gan.stages=2"]
    return vgt_runs.trainer_of(folder, *SHARED, *adversary, "training.ema.decay=0.5", f"output_dir={folder}/run")


def generator(folder: Path) -> BaseTrainer:
    averaged = ["training.ema.decay=0.5", f"output_dir={folder}/run"]
    return vgt_runs.trainer_of(folder, *SHARED, *averaged, component="generator")


COMMON: dict[str, tuple[Any, str]] = {
    "backward pass": (Part, "backward"),
    "update": (Part, "step"),
    "evaluation": (Evaluations, "run"),
    "sampling": (Evaluations, "_write"),
    "saving": (disk, "sync_file"),
    "logging": (StepLines, "append"),
}
PHASES: dict[Callable[[Path], BaseTrainer], dict[str, tuple[Any, str]]] = {
    reward: {"rollout": (RewardTrainer, "draw"), "scoring": (RewardTrainer, "score"), **COMMON},
    preference: {"encoding": (Encoding, "encode"), "judging": (DPOTrainer, "_loss"), **COMMON},
    supervised: {"encoding": (GLMTerms, "encode"), **COMMON},
    distillation: {"distillation step": (DMDRTrainer, "_accumulate"), **COMMON},
    autoencoder: {"adversary": (VGTAutoencoderTrainer, "_train_opponent"), **COMMON},
    generator: {"encoding": (VGTGeneratorTrainer, "_encode"), **COMMON},
}
"""Trainer -> phase -> the function whose calls a signal may meet."""


@dataclass
class Subject:
    """A trainer that forks of this process train, and what a run comes to that nobody disturbs."""

    kind: Callable[[Path], BaseTrainer]
    trainer: BaseTrainer
    folder: Path
    whole: dict[str, Any]
    calls: dict[str, int]
    changes: int

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def train(self) -> int:
        """Its exit code: goes on with what there is, or begins."""
        self.trainer.resume = chosen_point(self.trainer.config)
        result = self.trainer.train()
        return 0 if result.stopped_by is None else 128 + result.stopped_by

    def in_child(self, action: Callable[[], int]) -> int:
        return in_child(self.folder / "told", action)

    def told(self) -> str:
        return (self.folder / "told").read_text()


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for times, its log of words and that of its starts."""
    found: dict[str, Any] = {}
    lined = [path for path in run.rglob("*.jsonl") if ".discarded" not in path.name and path.name != SESSIONS]
    for path in sorted(lined):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [{name: value for name, value in line.items() if not is_timed(name)} for line in lines]
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    best = run / "checkpoints" / "best"
    found["best"] = best.read_text() if best.exists() else None
    found["checkpoint"] = json.loads((latest / "manifest.json").read_text())["files"]
    drawn = [*run.glob("samples/**/*.png"), *run.glob("rollouts/step-*/*")]
    found["pictures"] = {str(path.relative_to(run)): path.read_bytes() for path in sorted(drawn)}
    return found


@contextmanager
def at_call(owner: Any, name: str, act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` comes before each call of a function."""
    real = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        act()
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, called)
        yield


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Callable[[Callable[[Path], BaseTrainer]], Subject]:
    """Each made once."""
    return cache(lambda kind: undisturbed(kind, tmp_path_factory.mktemp(kind.__name__)))


def undisturbed(kind: Callable[[Path], BaseTrainer], folder: Path) -> Subject:
    found = Subject(kind, kind(folder), folder, {}, {}, 0)

    def counted() -> int:
        calls: Counter[str] = Counter()
        system = FaultySystem(folder / "run", lambda *_: None)
        with pytest.MonkeyPatch.context() as patch, system.interposed():
            for phase, (owner, name) in PHASES[kind].items():
                real = getattr(owner, name)

                def call(*arguments, phase=phase, real=real, **options):
                    calls[phase] += 1
                    return real(*arguments, **options)

                patch.setattr(owner, name, call)
            code = found.train()
        (folder / "counted").write_text(json.dumps([calls, len(system.operations)]))
        return code

    assert found.in_child(counted) == 0, found.told()
    found.calls, found.changes = json.loads((folder / "counted").read_text())
    found.whole = outcome(found.run)
    return found


def cases() -> list[Any]:
    """(trainer, (phase, signal, which of the phase's calls it meets))."""
    if WHICH == "phases":
        when = ("first", "middle", "last")
        every = [(kind, (phase, n, at)) for kind in PHASES for phase in PHASES[kind] for n in SIGNALS for at in when]
    else:
        killed = [phase for phase in PHASES[reward] if phase != "backward pass"]
        every = [(reward, (phase, signal.SIGKILL, "middle")) for phase in killed]
        stopped = zip(("scoring", "update", "saving"), SIGNALS[1:], strict=True)
        every += [(reward, (phase, number, "middle")) for phase, number in stopped]
        every.append((preference, ("encoding", signal.SIGKILL, "last")))
        every.append((preference, ("judging", signal.SIGTERM, "last")))
        every.append((autoencoder, ("adversary", signal.SIGKILL, "last")))
        every.append((generator, ("update", signal.SIGTERM, "middle")))
    return [pytest.param(kind, case, id=f"{kind.__name__}, {_label(*case)}") for kind, case in every]


def _label(phase: str, number: signal.Signals, at: str) -> str:
    return f"{phase}, {number.name}, {at}"


def assert_resumed_the_same(subject: Subject, where: str) -> None:
    assert subject.in_child(subject.train) == 0, where + subject.told()
    found = outcome(subject.run)
    assert found.keys() == subject.whole.keys(), where
    for name, whole in subject.whole.items():
        assert found[name] == whole, f"{where}: {name}"


@pytest.mark.parametrize(("kind", "case"), cases())
def test_stopped_or_killed_in_a_phase(subjects, kind, case):
    subject, (phase, number, at) = subjects(kind), case
    calls = subject.calls[phase]
    place = {"first": 1, "middle": (calls + 1) // 2, "last": calls}[at]
    seen: list[int] = []

    def signalled() -> None:
        seen.append(1)
        if len(seen) == place:
            os.kill(os.getpid(), number)

    def disturbed() -> int:
        with at_call(*PHASES[subject.kind][phase], signalled):
            return stoppable(subject.train)  # as the program does: before the loop it is the one that hears

    shutil.rmtree(subject.run)
    code = subject.in_child(disturbed)
    expected = {-9} if number == signal.SIGKILL else {128 + number, 0} if at == "last" else {128 + number}
    assert code in expected, subject.told()
    assert "Traceback" not in subject.told()
    assert_resumed_the_same(subject, f"{_label(*case)}, call {place} of {calls}")


@pytest.mark.parametrize("kind", PHASES if WHICH == "changes" else [reward], ids=lambda kind: kind.__name__)
def test_killed_at_a_change_of_its_files(subjects, kind):
    """Before the change, or half-way through it where it is a write."""
    subject = subjects(kind)
    places = range(subject.changes) if WHICH == "changes" else [subject.changes * part // 7 for part in (2, 4, 6)]
    tried = 0
    for place in places:
        for torn in (False, True):

            def decide(number: int, change: str, path: str, place: int = place, torn: bool = torn) -> str | None:
                if number == place:
                    if torn and change == "write":
                        return "torn"
                    os._exit(KILLED)
                return None

            def disturbed(decide: Callable[[int, str, str], str | None] = decide) -> int:
                with FaultySystem(subject.run, decide).interposed():
                    return subject.train()

            if torn and WHICH != "changes" and place != places[0]:
                continue
            shutil.rmtree(subject.run)
            assert subject.in_child(disturbed) == KILLED, subject.told()
            assert_resumed_the_same(subject, f"killed at change {place}, {'torn' if torn else 'before'}")
            tried += 1
    print(f"\n{tried} kills at {subject.changes} changes of a run")
