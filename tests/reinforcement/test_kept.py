"""What is kept of a step's samples is what the step had: pictures, scores, advantages, by prompt, plan and render."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.config import load_config
from glm_training.engine.errors import TrainingError
from glm_training.reinforcement import kept as kept_module
from glm_training.reinforcement.credit import Scored
from glm_training.rewards.types import RewardResult
from glm_training.trainers import reward_trainer
from glm_training.utils.distributed import World
from glm_training.utils.kept_rollouts import KeptRollout
from tests.runs import trainer_of

ROOT = Path(__file__).parents[2]
ON = (
    "logging.log_images=true",
    "reward.grpo.num_samples=4",
    "rollout.plans_per_prompt=2",
    "rollout.renders_per_plan=2",
)


def kept_steps(tmp_path: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (tmp_path / "run" / "rollouts").glob("step-*"))


def seen(monkeypatch) -> list[list[tuple[torch.Tensor, Scored]]]:
    """The pictures and chunks of each step, as they were when the advantages were known."""
    steps = []
    assign = reward_trainer.assign_advantages

    def watched(chunks, *rest):
        figures = assign(chunks, *rest)
        steps.append([(chunk.rollout.images.clone(), chunk) for chunk in chunks])
        return figures

    monkeypatch.setattr(reward_trainer, "assign_advantages", watched)
    return steps


def test_a_kept_step_is_what_the_step_had(tmp_path, monkeypatch):
    steps = seen(monkeypatch)
    trainer = trainer_of(
        tmp_path, *ON, "training.max_steps=1", "training.gradient_accumulation_steps=2", "logging.rollout_prompts=3"
    )
    trainer.train()
    kept = KeptRollout.read(tmp_path / "run" / "rollouts" / "step-000001")
    (first, one), (second, two) = steps[0]
    prompts = one.rollout.prompts + two.rollout.prompts
    assert (kept.prompts, kept.of, kept.plans, kept.renders) == (prompts[:3], 4, 2, 2)
    totals = torch.cat([one.result.total, two.result.total])[:12].tolist()
    assert kept.scores["total"] == pytest.approx(totals, abs=1e-6)
    assert kept.scores["structure"] == pytest.approx(totals, abs=1e-6)
    plans = torch.cat([one.plan_advantages, two.plan_advantages])[:6].tolist()
    renders = torch.cat([one.render_advantages, two.render_advantages])[:12].tolist()
    assert kept.plan_advantages == pytest.approx(plans, abs=1e-6)
    assert kept.render_advantages == pytest.approx(renders, abs=1e-6)
    images = torch.cat([first, second])[:12]
    for name, image in zip(kept.names, images, strict=True):
        with Image.open(tmp_path / "run" / "rollouts" / "step-000001" / name) as file:
            found = torch.from_numpy(np.asarray(file.convert("RGB")).copy()).permute(2, 0, 1) / 255
        assert found.shape == image.shape
        assert (found - image).abs().mean() < 0.1  # noise pictures suffer most from JPEG; others differ by 0.2 and more


def test_only_trained_halves_have_advantages_and_own_weights_a_total(tmp_path):
    trainer_of(
        tmp_path, "logging.log_images=true", "model.component=dit", "training.max_steps=1",
        "reward.dit.weights={structure: 1.0}",
    ).train()  # fmt: skip
    kept = KeptRollout.read(tmp_path / "run" / "rollouts" / "step-000001")
    assert kept.plan_advantages == [] and len(kept.render_advantages) == len(kept.names)
    assert kept.scores["dit_total"] == kept.scores["total"]


def test_the_first_each_interval_and_the_last_step_are_kept(tmp_path):
    trainer_of(tmp_path, *ON, "training.max_steps=5", "logging.rollout_interval=2").train()
    assert kept_steps(tmp_path) == [1, 2, 4, 5]


@pytest.mark.parametrize("off", ["logging.log_images=false", "logging.rollout_mib=0"])
def test_none_are_kept_where_that_is_off(tmp_path, off):
    trainer_of(tmp_path, *ON, off, "training.max_steps=1").train()
    assert not (tmp_path / "run" / "rollouts").exists()


def test_the_weights_are_the_same_with_and_without(tmp_path):
    found = []
    for name, limit in (("with", 64), ("without", 0)):
        trainer = trainer_of(tmp_path / name, *ON, f"logging.rollout_mib={limit}")
        trainer.train()
        found.append([value.detach().clone() for part in trainer.parts.values() for value in part.parameters.values()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_step_that_is_dropped_keeps_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise TrainingError("a fault after the pictures were taken")

    monkeypatch.setattr(reward_trainer.updates, "update_ar", broken)
    with pytest.raises(TrainingError):
        trainer_of(tmp_path, *ON).train()
    assert not (tmp_path / "run" / "rollouts").exists()


def test_a_disk_that_takes_no_pictures_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_module.RolloutFolder, "write", full)
    assert trainer_of(tmp_path, *ON).train().step == 2
    assert any("keeping pictures of rollouts failed" in record.getMessage() for record in caplog.records)


def test_large_pictures_are_made_small_and_small_ones_left_alone():
    assert kept_module._small(torch.rand(2, 3, 512, 1024)).shape == (2, 3, 128, 256)
    assert kept_module._small(torch.rand(1, 3, 64, 100)).shape == (1, 3, 64, 100)
    assert kept_module._small(torch.full((1, 3, 600, 600), float("nan"))).max() == 0


def test_another_process_keeps_nothing(tmp_path):
    trainer = trainer_of(tmp_path, *ON)
    assert not kept_module.RolloutKeeper(trainer.config, World(rank=1, world_size=2), 5).due(1)
    assert kept_module.RolloutKeeper(trainer.config, World(), 5).due(5)


def test_a_part_of_a_metric_that_applies_to_one_chunk_alone():
    """As the shapes of `objects`, where no prompt of a chunk names any."""
    config = load_config(ROOT / "configs/quickstart.yaml", ["rollout.plans_per_prompt=2"])
    words = {"text_accuracy": torch.ones(2), "objects": torch.ones(2)}
    for place in (0, 1):
        chunks = []
        for number in (0, 1):
            part = {"objects/shape": torch.tensor([0.5, 0.25])} if number == place else {}
            rollout: Any = SimpleNamespace(prompts=[f"prompt {number}"])
            scores = RewardResult(torch.ones(2), words | part, {}, {})
            chunks.append(Scored(rollout, scores, number, torch.zeros(2), torch.zeros(2)))
        kept = kept_module.kept_of(1, [(chunk, 1) for chunk in chunks], chunks, config)
        assert kept.scores["objects/shape"] == [None] * 2 * place + [0.5, 0.25] + [None] * 2 * (1 - place)
