"""An error in the middle of a run: the last finished step is saved first, then the run ends with a code and a message
of its own, and a resume comes to the end of the run that nothing disturbed."""

from __future__ import annotations

import errno
import json
import math

import pytest

from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.cli import training
from glm_training.data import ImageDataset
from glm_training.engine.evaluations import Evaluations
from glm_training.engine.figures import is_timed
from glm_training.engine.parts import Part
from glm_training.rewards import RewardCalculator
from glm_training.trainers.base_trainer import BaseTrainer
from tests.faulty_system import refusing
from tests.runs import config_of
from tests.same import assert_identical

SHARED = ["model.component=dit", "training.max_steps=2", "training.batch_size=1", "reward.grpo.num_samples=2"]
EVALUATED = ["evaluation.enabled=true", "evaluation.num_eval_samples=1", "logging.eval_interval=1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert training._train(config_of(folder, *SHARED, *EVALUATED)) == 0
    return folder / "run"


def figures(run) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_timed(name)} for line in lines]


def at_call(patch, kind, name: str, call: int, fault) -> None:
    """`fault(instance)` before the `call`-th call of a method; what it returns, if anything, is added to the call's."""
    real, calls = getattr(kind, name), []

    def method(self, *arguments, **options):
        calls.append(1)
        if len(calls) == call:
            fault(self)
        return real(self, *arguments, **options)

    patch.setattr(kind, name, method)


def broken(_) -> None:
    raise ZeroDivisionError("no score for this")


def poisoned(part: Part) -> None:
    """The gradient of one parameter becomes NaN."""
    next(value for value in part.parameters.values() if value.grad is not None).grad[0] = math.nan


FAULTS = {
    "a metric": (RewardCalculator, "compute_rewards", 3, broken, 1, "ZeroDivisionError: no score for this"),
    "an evaluation": (Evaluations, "run", 2, broken, 1, "ZeroDivisionError: no score for this"),
    "a gradient": (Part, "step", 2, poisoned, 3, "the gradient norm of the dit half is nan, in step 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_last_finished_step_is_saved_and_a_resume_comes_to_the_same_end(tmp_path, capfd, whole, fault):
    kind, name, call, break_it, code, words = FAULTS[fault]
    config = config_of(tmp_path, *SHARED, *EVALUATED)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, kind, name, call, break_it)
        assert training._train(config) == code
    error, run = capfd.readouterr().err, tmp_path / "run"
    saved = run / "checkpoints" / "step-000001"
    assert words in error and "Traceback" not in error
    assert "The run stopped after step 1 of 2 and nothing is lost: once the cause is mended, " in error
    assert f"--resume continues from {saved}" in error
    assert resolve_resume(run / "checkpoints", "latest").path == saved
    log = (run / "train.log").read_text()
    assert "Traceback (most recent call last)" in log and words in log, "the place of the error is in the log"
    assert training._train(config_of(tmp_path, *SHARED, *EVALUATED, "checkpoint.resume_from=latest")) == 0
    ends = [load_checkpoint(end / "checkpoints" / "step-000002") for end in (run, whole)]
    assert_identical(*ends)
    assert figures(run) == figures(whole)


def test_values_that_are_not_finite_leave_items_seed_and_norms(tmp_path, monkeypatch, capfd):
    at_call(monkeypatch, Part, "step", 2, poisoned)
    config = config_of(tmp_path, *SHARED, "training.max_grad_norm=1", "data.shuffle=false")
    assert training._train(config) == 3
    (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert f"The items, seed and norms of that step are in {dump}" in capfd.readouterr().err
    found = json.loads(dump.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert dump.name == "step-000002-process-0.json"
    assert (found["step"], found["process"], found["processes"], found["seed"]) == (2, 0, 1, 3)
    assert found["batches"] == [{"items": [1], "positions": [1]}], "the second prompt of four, in the second step"
    dit = found["parts"]["dit"]
    assert dit["gradient_norm"] == "nan" and dit["learning_rate"] == 0.05
    assert dit["gradients_not_finite"] == 1 == len(dit["first_not_finite"]), "clipping has not spread it"
    assert dit["finite_gradient_norm"] > 0 and dit["weight_norm"] > 0 and dit["largest_finite_gradient"]


def test_an_image_that_goes_missing_is_named(tmp_path, monkeypatch, capfd):
    def gone(dataset: ImageDataset) -> None:
        dataset._keeps_images, dataset._images = False, {}
        for path in (tmp_path / "data" / "target_images").iterdir():
            path.unlink()

    at_call(monkeypatch, ImageDataset, "batch", 2, gone)
    keys = ["training.use_reward=false", "logging.log_images=false", "cache.enabled=false"]
    config = config_of(tmp_path, *SHARED, *keys)
    assert training._train(config) == training.EXIT_CONFIG
    error = capfd.readouterr().err
    assert "target_images" in error and "does not exist" in error and "stopped after step 1 of 2" in error
    assert resolve_resume(tmp_path / "run" / "checkpoints", "latest").step == 1


def test_when_the_save_fails_too_both_are_told(tmp_path, monkeypatch, capfd):
    def poisoned_on_a_full_disk(part: Part) -> None:
        poisoned(part)
        disk.__enter__()

    disk = refusing(tmp_path / "run" / "checkpoints", code=errno.EROFS)
    at_call(monkeypatch, Part, "step", 2, poisoned_on_a_full_disk)
    try:
        assert training._train(config_of(tmp_path, *SHARED, "logging.save_interval=100")) == 3
    finally:
        disk.__exit__(None, None, None)
    error = capfd.readouterr().err
    assert "the gradient norm of the dit half is nan" in error
    assert "stopped after step 1 of 2, and saving that step failed as well: the checkpoint of step 1 cannot be" in error
    assert "mounted read-only" in error and "no checkpoint was saved" in error and "Traceback" not in error


def test_once_weights_have_changed_the_step_cannot_be_dropped(tmp_path, monkeypatch, capfd):
    """The AR half's update is made when the DiT half's gradient turns out to be NaN."""
    at_call(monkeypatch, Part, "step", 4, poisoned)
    both = ["model.component=both", *SHARED[1:3], "reward.grpo.num_samples=4", "logging.save_interval=1"]
    assert training._train(config_of(tmp_path, *both)) == 3
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    assert (
        "Step 2 of 2 was not finished, and had changed weights: once the cause is mended, --resume continues from "
        f"{saved}"
    ) in capfd.readouterr().err
    assert resolve_resume(saved.parent, "latest").path == saved


def test_a_run_directory_that_is_renamed_meanwhile_is_laid_out_again(tmp_path, monkeypatch, caplog):
    def renamed(_) -> None:
        (tmp_path / "run").rename(tmp_path / "moved")

    supervised = [*SHARED, "training.use_reward=false", "logging.save_interval=1"]
    with monkeypatch.context() as patch:
        at_call(patch, Part, "step", 2, renamed)
        assert training._train(config_of(tmp_path, *supervised)) == 0
    assert "renamed, removed or unlocked by somebody" in caplog.text
    ids = [json.loads((tmp_path / name / "run.json").read_text())["run"] for name in ("moved", "run")]
    assert ids[0] == ids[1] and (tmp_path / "run" / "config.yaml").is_file()
    assert resolve_resume(tmp_path / "moved" / "checkpoints", "latest").step == 1
    assert resolve_resume(tmp_path / "run" / "checkpoints", "latest").step == 2


@pytest.mark.parametrize("place", ["weights", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capfd, place):
    """`latest` stays, and no good checkpoint is pruned for them."""

    def lost(trainer: BaseTrainer) -> None:
        part = trainer.parts["dit"]
        parameter = list(part.parameters.values())[3]
        values = parameter if place == "weights" else part.optimizer.state[parameter]["exp_avg"]
        values.data.view(-1)[0] = math.inf

    at_call(monkeypatch, BaseTrainer, "save", 2, lost)
    adam = ["training.optimizer=adamw", "training.adam_beta1=0.9", "training.learning_rate=1e-4"]
    config = config_of(
        tmp_path,
        *SHARED,
        *adam,
        "training.use_reward=false",
        "logging.save_interval=1",
        "checkpoint.save_total_limit=1",
    )
    assert training._train(config) == 3
    error, checkpoints = capfd.readouterr().err, tmp_path / "run" / "checkpoints"
    assert "after step 2, 1 trained tensors and moments of the optimizer are not finite (first dit_" in error
    assert (checkpoints / "latest").read_text() == "step-000001\n"
    point = resolve_resume(checkpoints, "latest")
    assert point.step == 1 and point.skipped == ()
    assert not (checkpoints / "step-000002").exists() and not list(checkpoints.glob(".partial-*"))
