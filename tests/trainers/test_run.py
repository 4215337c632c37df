"""Which trainer a configuration asks for, and on how many processes it runs."""

from __future__ import annotations

import pytest

from glm_training.trainers import run
from tests import dmdr_runs, preference_runs, vgt_runs
from tests.runs import config_of


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["model.component=ar"], "RewardTrainer"),
        (["model.component=ar", "training.use_reward=false"], "ARTrainer"),
        (["model.component=dit", "training.use_reward=false"], "DiTTrainer"),
        (["training.use_reward=false"], "SupervisedTrainer"),
        (["reward.enabled=false"], "SupervisedTrainer"),
    ],
)
def test_rewards_and_halves_choose_the_trainer(tmp_path, keys, name):
    assert run.trainer_type(config_of(tmp_path, *keys)).__name__ == name


def test_methods_have_trainers_of_their_own(tmp_path):
    for name in ("pairs", "distillation"):
        (tmp_path / name).mkdir()
    assert run.trainer_type(preference_runs.config_of(tmp_path / "pairs", "sdxl")).__name__ == "DPOTrainer"
    assert run.trainer_type(dmdr_runs.config_of(tmp_path / "distillation")).__name__ == "DMDRTrainer"


@pytest.mark.parametrize(("key", "joins"), [("false", False), ("true", True), ("null", True)])
def test_processes_are_joined_unless_told_not_to(tmp_path, monkeypatch, key, joins):
    asked = []

    def join(*given):
        asked.append(given)
        raise RuntimeError("joined")

    monkeypatch.setattr(run, "init_world", join)
    with pytest.raises(RuntimeError, match="joined"):
        run.run_training(config_of(tmp_path, f"distributed.enabled={key}", "model.device_map=cpu"))
    assert asked == [(joins, None, "cpu")]


def test_vgt_has_a_trainer_for_each_of_its_models(tmp_path):
    for component, name in (("autoencoder", "VGTAutoencoderTrainer"), ("generator", "VGTGeneratorTrainer")):
        assert run.trainer_type(vgt_runs.config_of(tmp_path, component=component)).__name__ == name
