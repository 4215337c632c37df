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
    assert len(notes) == 1 and "prompts.txt): text_accuracy applies to 1 of 4 samples" in notes[0]
    files = [f"evaluation.eval_{role}={tmp_path}/data/{name}" for role, name in HELD_OUT.items()]
    _, notes = build(tmp_path, weights, "evaluation.enabled=true", "evaluation.num_eval_samples=1", *files)
    assert [note.split(" (")[0] for note in notes] == ["training data", "held-out data"]


HELD_OUT = {"prompts_file": "prompts.txt", "target_images_dir": "target_images"}


def test_rewards_that_do_not_fit_the_data_name_which(tmp_path):
    with pytest.raises(RewardConfigError, match=r"training data .*: no metric of .*text_accuracy.* 3 sample"):
        build(tmp_path, TEXT_ONLY)
    supervised = [TEXT_ONLY, "training.use_reward=false", "evaluation.enabled=true"]
    with pytest.raises(RewardConfigError, match=r"training data .*: no metric .*text_accuracy.* 1 sample"):
        build(tmp_path, *supervised)


def test_a_half_needs_something_to_learn_from_in_the_training_data_and_nowhere_else(tmp_path):
    keys = ["reward.metrics={structure: 1, text_accuracy: 1}", "reward.dit.weights={text_accuracy: 1}"]
    _, notes = build(tmp_path, *keys)
    assert any("applies to 1 of 4 samples" in note and "paid for learns from those" in note for note in notes)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a red circle", "target": "data/target_images/0.png"}\n')
    _, told = build(
        tmp_path, *keys, "evaluation.enabled=true", f"evaluation.eval_prompts_file={tmp_path}/held_out.jsonl"
    )
    assert not any("held-out" in note and "learns" in note for note in told)
    plain = f"data.prompts_file={tmp_path}/held_out.jsonl"
    with pytest.raises(
        RewardConfigError, match=r"training data .*: no metric of \['text_accuracy'\] applies to 1 sample"
    ):
        build(tmp_path, *keys, plain, "data.target_images_dir=null", "training.batch_size=1")


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
    assert list(metric.weights) == ["Brightness"]
    whole, _ = build(tmp_path, f"reward.calculator={spec}")
    assert type(whole).__name__ == "Brightness"
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(RewardConfigError, match=f"there is no file {tmp_path}/data/rewards/own.py.*current directory"):
        build(tmp_path, f"reward.calculator={spec}")


def test_options_reach_the_metric(tmp_path):
    calculator, _ = build(tmp_path, "reward.options.text_accuracy.min_confidence=0.7")
    assert calculator.options.text_accuracy.min_confidence == 0.7


def test_prompts_that_the_model_cuts_or_cannot_take_are_told_with_training_and_held_out_data(tmp_path):
    config = config_of(tmp_path)
    long, page = tmp_path / "long.txt", tmp_path / "page.txt"
    long.write_text('a sign "' + "y" * 3000 + '"\n', encoding="utf-8")
    page.write_text("x" * 9000 + "\n", encoding="utf-8")
    for key in ("data.prompts_file", "evaluation.eval_prompts_file"):
        rest = ["reward.metrics={text_accuracy: 1}", "data.target_images_dir=null"]
        config = config_of(tmp_path, *rest, f"{key}={long}")
        training = setup.build_dataset(config)
        held_out = setup.build_evaluation_dataset(config, training)
        told, quiet = (training, held_out) if key.startswith("data") else (held_out, training)
        assert f"{long}:1: a quoted text of 3000 bytes" in told.remarks[0] and quiet.remarks == []
        with pytest.raises(DataError, match="page.txt:1: the prompt has 9000 tokens"):
            config = config_of(tmp_path, *rest, f"{key}={page}")
            setup.build_evaluation_dataset(config, setup.build_dataset(config))


def test_a_model_that_is_not_here_leaves_the_lengths_open(tmp_path):
    assert setup.build_dataset(config_of(tmp_path, "model.name=nobody/nothing")).remarks == [
        "how long the prompts are for nobody/nothing is told once its tokenizers are here"
    ]
