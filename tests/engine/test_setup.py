"""What is checked before a model is loaded: rewards against the data, held-out data against the rewards."""

from __future__ import annotations

import pytest

from glm_training.data import DataError
from glm_training.engine import setup
from glm_training.rewards import RewardCalculator, RewardConfigError
from glm_training.utils.distributed import World
from tests.runs import config_of

TEXT_ONLY = "reward.metrics={text_accuracy: 1.0}"
OWN = """
from glm_training.rewards import RewardCalculator


class Brightness(RewardCalculator):
    def compute_reward(self, generated_image, target_image, prompt):
        return 0.25
"""


def build(folder, *overrides: str) -> tuple[RewardCalculator, list[str]]:
    config = config_of(folder, *overrides)
    dataset = setup.build_dataset(config)
    held_out = setup.build_evaluation_dataset(config, dataset)
    return setup.build_rewards(config, World(), setup.datasets_to_score(config, dataset, held_out))


def held_out_without_targets(folder) -> str:
    path = folder / "held_out.jsonl"
    path.write_text('{"prompt": "a red circle"}\n', encoding="utf-8")
    return f"evaluation.eval_prompts_file={path}"


def test_notes_tell_of_metrics_that_do_not_always_apply(tmp_path):
    weights = "reward.metrics={text_accuracy: 0.5, structure: 0.5}"
    _, notes = build(tmp_path, weights)
    assert len(notes) == 1 and notes[0].startswith("training data: text_accuracy applies to 1 of 4 samples")
    files = [f"evaluation.eval_{role}={tmp_path}/data/{name}" for role, name in HELD_OUT.items()]
    _, notes = build(tmp_path, weights, "evaluation.enabled=true", "evaluation.num_eval_samples=1", *files)
    assert [note.split(":")[0] for note in notes] == ["training data", "held-out data"]


HELD_OUT = {"prompts_file": "prompts.txt", "target_images_dir": "target_images"}


def test_rewards_that_do_not_fit_the_data_name_which(tmp_path):
    with pytest.raises(RewardConfigError, match=r"training data: no metric of .*text_accuracy.* 3 sample"):
        build(tmp_path, TEXT_ONLY)
    supervised = [TEXT_ONLY, "training.use_reward=false", "evaluation.enabled=true"]
    with pytest.raises(RewardConfigError, match=r"held-out data: no metric .*text_accuracy.* 1 sample"):
        build(tmp_path, *supervised)


def test_held_out_prompts_need_targets_where_they_are_compared_with(tmp_path):
    prompts = held_out_without_targets(tmp_path)
    with pytest.raises(DataError, match="held_out.jsonl:1: index 0 has no target image"):
        build(tmp_path, "evaluation.enabled=true", prompts)
    build(tmp_path, "evaluation.enabled=false", prompts)


def test_held_out_prompts_need_targets_for_ones_own_reward_where_the_training_data_has_them(tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    own = f"reward.metrics={{'{tmp_path}/own.py:Brightness': 1.0}}"
    prompts = held_out_without_targets(tmp_path)
    with pytest.raises(DataError, match="index 0 has no target image"):
        build(tmp_path, own, "evaluation.enabled=true", prompts)
    build(tmp_path, own, "evaluation.enabled=true", prompts, "data.target_images_dir=null")


def test_a_reward_is_found_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "own.py").write_text(OWN, encoding="utf-8")
    spec = "rewards/own.py:Brightness"
    monkeypatch.chdir(tmp_path)
    metric, _ = build(tmp_path, f"reward.metrics={{'{spec}': 1.0}}")
    assert list(metric.weights) == [spec]
    whole, _ = build(tmp_path, f"reward.calculator={spec}")
    assert type(whole).__name__ == "Brightness"
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(RewardConfigError, match=f"there is no file {tmp_path}/data/rewards/own.py.*current directory"):
        build(tmp_path, f"reward.calculator={spec}")


def test_options_reach_the_metric(tmp_path):
    calculator, _ = build(tmp_path, "reward.options.text_accuracy.min_confidence=0.7")
    assert calculator.options.text_accuracy.min_confidence == 0.7
