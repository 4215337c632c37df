"""A stop signal in a rollout, an update or an evaluation: what is dropped, what is saved, what resumes."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.engine.parts import Part
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.utils.signals import StopRequested
from tests.runs import trainer_of
from tests.same import assert_identical

SHARED = ["model.component=dit", "training.max_steps=2", "training.batch_size=1", "reward.grpo.num_samples=2"]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_at(monkeypatch, kind, name: str, call: int) -> list[int]:
    """A signal in the `call`-th call of a method; the list holds the number of each call that went to its end."""
    real, calls, finished = getattr(kind, name), [], []

    def method(self, *arguments, **options):
        calls.append(len(calls) + 1)
        number = len(calls)
        if number == call:
            interrupt()
        result = real(self, *arguments, **options)
        finished.append(number)
        return result

    monkeypatch.setattr(kind, name, method)
    return finished


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder, *SHARED, "evaluation.enabled=true").train()
    return folder / "run"


@pytest.mark.parametrize(
    ("kind", "name", "call", "step"),
    [
        (DiTComponent, "sample", 1, 0),  # the first evaluation
        (DiTComponent, "sample", 3, 1),  # the second rollout
        (ARComponent, "rollout", 2, 0),  # the first rollout
        (Part, "backward", 5, 1),  # between two terms of the second update
        (Part, "step", 2, 2),  # the second optimizer step: finished first
        (DiTComponent, "sample", 4, 2),  # the last evaluation
    ],
)
def test_an_interrupted_run_resumes_to_the_same_end(tmp_path, monkeypatch, whole, kind, name, call, step):
    with monkeypatch.context() as patch:
        finished = interrupted_at(patch, kind, name, call)
        result = trainer_of(tmp_path, *SHARED, "evaluation.enabled=true").train()
    assert (result.step, result.stopped_by) == (step, signal.SIGINT)
    assert max(finished, default=0) <= call and (call in finished) == (kind is Part), "nobody waits for it"
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == f"step-{step:06d}"
    result = trainer_of(tmp_path, *SHARED, "evaluation.enabled=true", "checkpoint.resume_from=latest").train()
    assert result.step == 2 and result.stopped_by is None and result.before and result.after
    left, right = (load_checkpoint(run / "checkpoints" / "step-000002") for run in (whole, tmp_path / "run"))
    assert_identical(left, right)
    assert _evaluations(tmp_path / "run") == _evaluations(whole)


def _evaluations(run) -> list[str]:
    return (run / "evaluations.jsonl").read_text().splitlines()


def test_once_weights_changed_the_step_is_finished(tmp_path):
    trainer = trainer_of(tmp_path, *SHARED)
    trainer.signals.received = signal.SIGTERM
    with pytest.raises(StopRequested):
        trainer.check_stop()
    for parameter in trainer.parts["dit"].parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.update(trainer.parts["dit"])
    trainer.check_stop()


def test_supervised_training_stops_between_chunks(tmp_path):
    trainer = trainer_of(tmp_path, *SHARED, "training.use_reward=false", "training.gradient_accumulation_steps=2")
    real, seen = trainer.next_batch, []

    def drawing():
        seen.append(1)
        interrupt()
        return real()

    trainer.next_batch = drawing
    result = trainer.train()
    assert (result.step, result.stopped_by, len(seen)) == (0, signal.SIGINT, 1)
    assert trainer.sampler.position == 0
