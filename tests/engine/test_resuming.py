"""Whether a checkpoint may be continued under another configuration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from glm_training.checkpoint.manifest import Manifest
from glm_training.checkpoint.resume import ResumePoint
from glm_training.engine.errors import TrainingError
from glm_training.engine.resuming import check_drift, moved_schedules, save_context, weights_digests
from glm_training.trainers.dmdr_trainer import dynamics
from tests import dmdr_runs
from tests.runs import config_of


def point_of(folder: Path, *overrides: str) -> ResumePoint:
    """A checkpoint that such a run would have left."""
    metadata = save_context(config_of(folder, *overrides), {})
    return ResumePoint(folder / "step-000001", Manifest(1, (), metadata, {}))


ACCEPT = "resume.accept=[training, optimizer]"


def test_hyperparameters_of_the_optimizer_may_change_where_that_is_accepted(tmp_path):
    changed = ("training.optimizer=adamw", "training.weight_decay=0.5", "training.adam_beta2=0.5")
    point = point_of(tmp_path, "training.optimizer=adamw")
    with pytest.raises(TrainingError, match=r"training.adam_beta2: 0.999 -> 0.5\n.*training.weight_decay: 0.01 -> 0.5"):
        check_drift(point, config_of(tmp_path, *changed), {})
    check_drift(point, config_of(tmp_path, *changed, ACCEPT), {})


@pytest.mark.parametrize(
    "changed", ["training.optimizer=adamw", "optimizer.dit.name=adamw"], ids=["training", "one half"]
)
def test_another_optimizer_is_refused_by_name_even_if_accepted(tmp_path, changed):
    point = point_of(tmp_path, "training.optimizer=sgd")
    wanted = r"cannot be continued with another optimizer:(.|\n)*the dit half was trained with sgd, .* asks for adamw"
    for options in ((), (ACCEPT,)):
        with pytest.raises(TrainingError, match=wanted):
            check_drift(point, config_of(tmp_path, "training.optimizer=sgd", changed, *options), {})


@pytest.mark.parametrize(
    ("saved", "now", "told"),
    [
        (
            ["lora.enabled=true", "lora.rank=4"],
            ["lora.enabled=true", "lora.dit.rank=8"],
            "dit half adapters of rank 4 w",
        ),
        (["lora.enabled=true"], ["lora.enabled=true", "lora.ar.enabled=false"], "this run trains all weights"),
        (["model.component=ar"], ["model.component=both"], "of the dit half no weights were trained"),
        (["model.component=both"], ["model.component=ar"], "dit half all weights were trained, .* trains no weights"),
    ],
)
def test_other_trained_weights_are_refused_by_name_even_if_accepted(tmp_path, saved, now, told):
    accepted = "resume.accept=[model.component, lora, checkpoint]"
    with pytest.raises(TrainingError, match=f"cannot be continued with other trained weights:(.|\n)*{told}"):
        check_drift(point_of(tmp_path, *saved), config_of(tmp_path, *now, accepted), {})
    check_drift(point_of(tmp_path, *saved), config_of(tmp_path, *saved, accepted), {})


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (["lora_dit"], "start a new run with lora.start_from set to it, .* or model.adapters, which merges them$"),
        (["pipeline"], "start a new run with model.name set to it$"),
        (["pipeline", "lora_dit"], "lora.start_from set to it, .* or model.name set to it$"),
    ],
)
def test_what_cannot_go_on_is_led_to_what_its_checkpoint_holds(tmp_path, held, told):
    point = point_of(tmp_path, "training.optimizer=sgd")
    for name in held:
        (point.path / name).mkdir(parents=True)
    with pytest.raises(TrainingError, match=told):
        check_drift(point, config_of(tmp_path, "training.optimizer=adamw"), {})
    with pytest.raises(TrainingError, match=told):
        check_drift(point, config_of(tmp_path, "model.component=ar"), {})


def test_moments_of_another_precision_are_refused_before_the_model_is_loaded(tmp_path):
    adamw = ("training.optimizer=adamw", "training.adam_beta1=0.9")
    narrow = config_of(tmp_path, *adamw, "optimizer.moments_dtype=bfloat16", ACCEPT)
    with pytest.raises(TrainingError, match="trained with adamw, and this run asks for adamw with moments in bfloat16"):
        check_drift(point_of(tmp_path, *adamw), narrow, {})


def test_the_same_optimizer_named_in_another_place_is_no_other(tmp_path):
    point = point_of(tmp_path, "training.optimizer=sgd")
    named = ("training.optimizer=adamw", "optimizer.ar.name=sgd", "optimizer.dit.name=sgd", ACCEPT)
    check_drift(point, config_of(tmp_path, *named), {})


def test_data_that_changed_is_named_unless_accepted(tmp_path):
    point = ResumePoint(
        tmp_path / "step-000001", Manifest(1, (), save_context(config_of(tmp_path), {"0": "a", "1": "b"}), {})
    )
    check_drift(point, config_of(tmp_path), {"0": "a", "1": "b"})
    for digests in ({"0": "a", "1": "c"}, {"0": "a"}, {"0": "a", "1": "b", "2": "c"}):
        with pytest.raises(TrainingError, match="other settings or data"):
            check_drift(point, config_of(tmp_path), digests)
        check_drift(point, config_of(tmp_path, "resume.accept=[data]"), digests)


def test_weights_that_changed_under_what_was_trained_are_named_unless_accepted(tmp_path):
    name = "weights of model.name"
    for saved in ({"0": "a", name: "b"}, {"0": "a"}):  # one of an earlier version, which kept none of them
        context = save_context(config_of(tmp_path), saved)
        point = ResumePoint(tmp_path / "step-000001", Manifest(1, (), context, {}))
        check_drift(point, config_of(tmp_path), {"0": "a", name: "b"})
        if name in saved:
            with pytest.raises(TrainingError, match=f"other settings or data:\n  {name}: what is in it changed\n"):
                check_drift(point, config_of(tmp_path), {"0": "a", name: "c"})
        check_drift(point, config_of(tmp_path, "resume.accept=[data]"), {"0": "a", name: "c"})


def test_weights_are_told_by_what_is_in_their_folders(tmp_path):
    folder = tmp_path / "expert" / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    keys = [f"model.name={tmp_path}/expert", "training.method=opd", f"opd.teachers.one.model={tmp_path}/expert"]
    config = config_of(tmp_path, *keys, "opd.teachers.one.prompts_file=prompts.txt")
    first = weights_digests(config)
    assert sorted(first) == ["weights of model.name", "weights of opd.teachers.one.model"]
    (folder / "README.md").write_text("a word on it")
    (tmp_path / "expert" / "manifest.json").write_text("{}")  # of the checkpoint, not of the pipeline
    assert weights_digests(config) == first
    (folder / "model.safetensors").write_bytes(b"others!")
    assert weights_digests(config).keys() == first.keys() and not set(weights_digests(config).values()) & {
        *first.values()
    }
    assert weights_digests(config_of(tmp_path)) == {}


def test_a_run_may_be_made_longer_but_not_otherwise(tmp_path):
    point = point_of(tmp_path, "training.max_steps=4")
    check_drift(point, config_of(tmp_path, "training.max_steps=6"), {})
    with pytest.raises(TrainingError, match="seed: 3 -> 4"):
        check_drift(point, config_of(tmp_path, "training.max_steps=4", "seed=4"), {})
    check_drift(point, config_of(tmp_path, "training.max_steps=4", "seed=4", "resume.accept=[seed]"), {})


# -- a run that is made longer -----------------------------------------------------------------------------------------


def test_schedules_that_end_with_the_run_move_with_its_end_and_that_is_said(tmp_path):
    config = dmdr_runs.config_of(tmp_path, "training.lr_scheduler=cosine", "dmdr.real_scale=0.8")
    # DynaDG, a cosine from 0.8 to 0: half-way through 10 steps, and a quarter of the way through 20
    assert dynamics(config, 10).real_scale(5) == pytest.approx(0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert dynamics(config, 20).real_scale(5) == pytest.approx(0.8 * (1 + math.cos(math.pi / 4)) / 2)
    (told,) = moved_schedules(config, 10, 20)
    assert "was to have 10 steps and now has 20" in told and "dmdr.dynamic_steps=10 resume.accept=" in told
    assert "the learning rate of unet (cosine), DynaDG and DynaRS." in told
    assert moved_schedules(config, 10, 10) == []


@pytest.mark.parametrize("fixed", ["dmdr.dynamic_steps=10", "dmdr.cold_start_steps=10"])
def test_schedules_of_a_length_of_their_own_stay(tmp_path, fixed):
    config = dmdr_runs.config_of(tmp_path, fixed)
    assert dynamics(config, 20).real_scale(5) == dynamics(config, 10).real_scale(5)
    assert moved_schedules(config, 10, 20) == []
