"""What the loop does around a training step: which samples it gets, what is kept when, and what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.data import StatefulSampler
from glm_training.engine.errors import TrainingError
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World
from tests.runs import trainer_of

DIT = ["training.use_reward=false", "model.component=dit"]


def idle(trainer: BaseTrainer) -> BaseTrainer:
    """Its steps draw their batch and train nothing."""

    def step() -> dict[str, float]:
        _, positions = trainer.next_batch()
        return {"position": float(positions[0])}

    trainer.training_step = step  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_are_named_by_their_place_among_those_of_all_processes(tmp_path, rank):
    """Two processes with two samples each, of five examples in file order; epochs are those of the samples drawn."""
    trainer, asked = trainer_of(tmp_path, *DIT), []
    trainer.sampler = StatefulSampler(5, 2, seed=0, shuffle=False, rank=rank, world_size=2)
    trainer.world = World(rank, 2)
    trainer.dataset = SimpleNamespace(
        batch=lambda indices, epoch: asked.append((list(indices), list(epoch))), prefetch=lambda indices, epoch: None
    )
    positions = [trainer.next_batch()[1] for _ in range(2)]
    assert positions == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]][rank]
    assert asked == [[([0, 1], [0, 0]), ([4, 0], [0, 1])], [([2, 3], [0, 0]), ([1, 2], [1, 1])]][rank]


def test_the_order_of_the_prompts_is_that_of_the_seed_or_the_file(tmp_path):
    orders = [trainer_of(tmp_path, *DIT, "training.batch_size=4", f"seed={seed}").sampler.peek() for seed in range(6)]
    assert len({tuple(order) for order in orders}) > 1 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert trainer_of(tmp_path, *DIT, "training.batch_size=4", "data.shuffle=false").sampler.peek() == [0, 1, 2, 3]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/checkpoints").glob("step-*"))


def test_a_run_saves_at_its_interval_and_at_its_end_and_keeps_the_newest(tmp_path):
    keys = ["training.max_steps=5", "logging.save_interval=2", "checkpoint.save_lora_only=true", "lora.enabled=true"]
    idle(trainer_of(tmp_path, *DIT, *keys)).train()
    assert checkpoints(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    idle(trainer_of(tmp_path, *DIT, *keys, f"output_dir={tmp_path}/other", "checkpoint.save_total_limit=2")).train()
    kept = sorted(path.name for path in (tmp_path / "other/checkpoints").glob("step-*"))
    assert kept == ["step-000004", "step-000005"]


def test_a_checkpoint_knows_its_step_and_the_samples_that_were_drawn(tmp_path):
    trainer = idle(trainer_of(tmp_path, *DIT, "training.max_steps=3", "checkpoint.save_optimizer=false"))
    trainer.train()
    state = load_checkpoint(tmp_path / "run/checkpoints/step-000003")
    assert state["trainer"]["step"] == 3 and state["sampler"] == {"position": 6}
    assert not [name for name in state if name.endswith("_optimizer")]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["position"]) for line in lines] == [(1, 0), (2, 2), (3, 4)]


ADAPTED = ["lora.enabled=true", "lora.rank=2", "lora.alpha=6", "training.max_steps=1"]


def adapted_run(folder: Path, *overrides: str):
    """A run of adapters that are not zero."""
    trainer = idle(trainer_of(folder, *DIT, *ADAPTED, *overrides))
    for i, parameter in enumerate(trainer.parts["dit"].parameters.values()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 10)
    trainer.train()
    return trainer


def test_the_pipeline_in_a_checkpoint_has_the_adapters_merged(tmp_path):
    """W + alpha / rank B A, with alpha / rank 3."""
    trainer = adapted_run(tmp_path, "checkpoint.save_lora_only=false", "checkpoint.save_lora=false")
    saved = tmp_path / "run/checkpoints/step-000001"
    assert {path.name for path in saved.iterdir() if path.is_dir()} >= {"pipeline", "lora_dit"}
    assert not (tmp_path / "run/lora").exists()
    weights = load_file(next((saved / "pipeline/transformer").glob("*.safetensors")))
    name, down = next((n, p) for n, p in trainer.parts["dit"].parameters.items() if ".lora_A." in n)
    layer = trainer.family.module("dit").get_submodule(name.split(".lora_A.")[0])
    merged = layer.base_layer.weight + 3 * layer.lora_B["default"].weight @ down
    key = next(key for key in weights if name.split(".lora_A.")[0].endswith(key.removesuffix(".weight")))
    torch.testing.assert_close(weights[key].float(), merged.detach(), rtol=1e-5, atol=1e-6)
    assert (merged - layer.base_layer.weight).abs().max() > 1e-3


def test_adapters_alone_are_saved_where_asked(tmp_path):
    adapted_run(tmp_path, "checkpoint.save_lora_only=true", "checkpoint.save_lora=true")
    saved = tmp_path / "run/checkpoints/step-000001"
    assert (saved / "lora_dit").is_dir() and not (saved / "pipeline").exists()
    assert any((tmp_path / "run/lora/step-000001/dit").iterdir())


def test_weights_that_changed_are_noticed_on_resume(tmp_path):
    build_tiny().save_pretrained(tmp_path / "model")
    keys = [*DIT, f"model.name={tmp_path}/model", "lora.enabled=true", "checkpoint.save_lora_only=true"]
    idle(trainer_of(tmp_path, *keys, "training.max_steps=1")).train()
    other = build_tiny()
    with torch.no_grad():
        other.transformer.proj_out.bias.add_(1)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(TrainingError, match="other settings or data:\n  weights of model.name: what is in it changed"):
        trainer_of(tmp_path, *keys, "training.max_steps=2", "checkpoint.resume_from=latest")


def test_images_that_changed_are_noticed_on_resume(tmp_path):
    idle(trainer_of(tmp_path, *DIT, "training.max_steps=1")).train()
    pixels = np.full((64, 64, 3), 9, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data/target_images/2.png")
    resume = ["training.max_steps=2", "checkpoint.resume_from=latest"]
    with pytest.raises(TrainingError, match="made under other settings or data:\n.*2"):
        idle(trainer_of(tmp_path, *DIT, *resume)).train()
    assert idle(trainer_of(tmp_path, *DIT, *resume, "resume.accept=[data]")).train().step == 2
