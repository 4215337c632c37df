"""SDXL finetuned on plain pictures: its loss by hand, what it is told of sizes and prompts, what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline

from glm_training.config import Config, load_config
from glm_training.engine.encoding.encoder import SDXLEncoder
from glm_training.models.sdxl.tiny import build_tiny
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.run import build_trainer
from glm_training.trainers.supervised_trainer import SupervisedTrainer
from glm_training.utils.distributed import init_world
from glm_training.utils.randomness import normal, uniform
from tests.config.building import first_paths
from tests.data.captioned.building import noise
from tests.runs import PROMPTS, weights_of
from tests.same import assert_identical


def config_of(folder: Path, *overrides: str, own: bool = False) -> Config:
    """Two steps of two pictures of 72 x 64 px, fp32, SGD, on the layout of `prompts.txt`, or (`own`) on captions beside
    pictures, one of them wide."""
    targets, pictures = folder / "data/target_images", folder / "pictures"
    if not targets.is_dir():
        targets.mkdir(parents=True)
        pictures.mkdir()
        (folder / "data/prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        for number, prompt in enumerate(PROMPTS):
            (targets / f"{number}.png").write_bytes(noise(number, (72, 64)))
            (pictures / f"{number}.png").write_bytes(noise(number, (200, 70) if number == 3 else (72, 64)))
            (pictures / f"{number}.txt").write_text(prompt, encoding="utf-8")
    numbered = {
        "prompts_file": str(folder / "data/prompts.txt"),
        "target_images_dir": str(targets),
        "image_size": {"height": 64, "width": 64},
    }
    captioned = {"images": str(pictures), "validation": 0, "min_side": 0}
    captioned |= {"image_size": {"height": 128, "width": 128}, "buckets": {"enabled": True, "smallest": 64}}
    tree: dict[str, Any] = {
        "seed": 3,
        "output_dir": str(folder / "run"),
        "model": {
            "family": "sdxl",
            "name": "tiny-random",
            "torch_dtype": "float32",
            "unet": {"num_inference_steps": 2, "guidance_scale": 1.0},
        },
        "data": {**(captioned if own else numbered), "num_workers": 0},
        "training": {
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "learning_rate": 0.02,
            "optimizer": "sgd",
            "adam_beta1": 0.0,
            "max_grad_norm": 0,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "reward": {"enabled": False},
        "lora": {"enabled": True, "rank": 4, "alpha": 4.0},
        "logging": {"log_interval": 1, "log_images": False, "use_tensorboard": False},
        "evaluation": {"num_eval_samples": 2},
        "checkpoint": {"save_lora_only": True},
    }
    path = folder / "own.yaml" if own else folder / "numbered.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(path, list(overrides))


FULL = ["lora.enabled=false", "checkpoint.save_lora_only=false", "training.learning_rate=1e-3"]


def trainer_of(folder: Path, *overrides: str, own: bool = False) -> SupervisedTrainer:
    trainer = build_trainer(config_of(folder, *overrides, own=own), init_world(True, None))
    assert isinstance(trainer, SupervisedTrainer)
    return trainer


def stepped(folder: Path, *overrides: str, own: bool = False, steps: int = 3) -> SupervisedTrainer:
    trainer = trainer_of(folder, *overrides, own=own)
    trainer.prepare()
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return trainer


@torch.no_grad()
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_error_of_the_noise_at_a_drawn_level(tmp_path: Path, gamma: float | None) -> None:
    """x = a x0 + b e at step t = floor(1000 u); the error is that of e, weighted by min(snr, 5) / snr."""
    trainer = trainer_of(tmp_path, "training.prior_dropout=0", f"training.min_snr_gamma={gamma or 'null'}")
    trainer.prepare()
    batch = trainer.dataset.batch([2, 0])
    terms, unet = trainer.supervision.terms, trainer.family.unet
    encoded = terms.encode(batch, [7, 4])
    found = terms.loss(trainer.parts["unet"], encoded)
    trainer.dataset.decodes = True
    pixels = trainer.dataset.batch([2, 0]).targets
    clean = torch.cat([unet.encode_images(pixels[row : row + 1]) for row in range(2)])
    assert torch.equal(encoded.clean, clean)
    names = [(7,), (4,)]
    u = uniform(3, "supervised/level", names, (2,))[:, 0]
    alphas = unet.scheduler.alphas_cumprod
    steps = (u * len(alphas)).long()
    a, b = alphas[steps].sqrt().view(-1, 1, 1, 1), (1 - alphas[steps]).sqrt().view(-1, 1, 1, 1)
    drawn = normal(3, "supervised/noise", names, tuple(clean.shape[1:]))
    text = unet.encode_prompts([PROMPTS[2], PROMPTS[0]])
    # 64 x 72 px files, (height, width), cut in the middle to 64 x 64
    ids = torch.tensor([[64, 72, 0, 4, 64, 64]] * 2)
    predicted = unet(a * clean + b * drawn, steps, text, ids)
    errors = (predicted - drawn).square().flatten(1).mean(1)
    snr = (a / b).square().flatten()
    weights = torch.ones(2) if gamma is None else snr.clamp(max=gamma) / snr
    torch.testing.assert_close(found.loss, (errors * weights).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.metrics["error"], errors.mean(), rtol=1e-4, atol=1e-6)


def test_a_dropped_prompt_is_what_guidance_leads_away_from(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "training.prior_dropout=0.5")
    trainer.prepare()
    names = [(place,) for place in range(40)]
    dropped = (uniform(3, "supervised/level", names, (2,))[:, 1] < 0.5).tolist()
    assert 8 < sum(dropped) < 32
    for place in (dropped.index(True), dropped.index(False)):
        text = trainer.supervision.terms.encode(trainer.dataset.batch([1]), [place]).condition.text
        own = trainer.family.unet.encode_prompts([PROMPTS[1]])
        expected = own.zeros() if dropped[place] else own
        torch.testing.assert_close(text.prompt_embeds, expected.prompt_embeds)
        torch.testing.assert_close(text.pooled, expected.pooled)


@torch.no_grad()
def test_held_out_pictures_are_judged_with_their_prompts_at_four_levels(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "training.prior_dropout=1", "training.min_snr_gamma=5")
    trainer.prepare()
    judged = trainer.judge()
    assert str(trainer.judged()) == "2 training targets" and judged.keys() == {"unet/loss"}
    unet, batch = trainer.family.unet, trainer.held_out.batch([1])
    clean, alphas = unet.encode_images(batch.targets), unet.scheduler.alphas_cumprod
    errors = []
    for level in range(4):
        u = (level + uniform(1234, "supervised/held-out level", [(1, level)], (1,))[:, 0]) / 4
        step = (u * len(alphas)).long()
        drawn = normal(1234, "supervised/held-out noise", [(1, level)], tuple(clean.shape[1:]))
        noisy = alphas[step].sqrt() * clean + (1 - alphas[step]).sqrt() * drawn
        predicted = unet(noisy, step, unet.encode_prompts([PROMPTS[1]]), torch.tensor([[64, 72, 0, 4, 64, 64]]))
        errors.append((predicted - drawn).square().mean())
    torch.testing.assert_close(judged["unet/loss"][1], torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own", [False, True], ids=["prompts.txt", "own pictures"])
@pytest.mark.parametrize("kind", [[], FULL], ids=["adapters", "full"])
def test_a_cache_changes_no_bit_and_is_filled_once(tmp_path: Path, own: bool, kind: list[str], monkeypatch) -> None:
    first = stepped(tmp_path, *kind, own=own)
    start = weights_of(trainer_of(tmp_path, *kind, own=own))["unet"]
    assert any(not torch.equal(value, start[name]) for name, value in weights_of(first)["unet"].items())
    plain = stepped(tmp_path, *kind, "cache.enabled=false", own=own)
    assert_identical(weights_of(first), weights_of(plain))
    assert_identical(first.judge(), plain.judge())
    assert len(list((tmp_path / "run/cache").rglob("*.safetensors"))) == 4 + 4, "pictures and prompts"
    for name in ("picture", "text"):
        monkeypatch.setattr(SDXLEncoder, name, lambda *_: pytest.fail("encoded again"))
    assert_identical(weights_of(stepped(tmp_path, *kind, own=own)), weights_of(first))


def test_own_pictures_keep_their_shapes_and_the_unet_is_told(tmp_path: Path) -> None:
    """A file of 200 x 70 px covers 192 x 64 as 192 x 67.2 px: 1.6 px are cut off at the top, none at the side."""
    trainer = trainer_of(tmp_path, own=True)
    trainer.prepare()
    assert sorted(trainer.dataset.size_of(index) for index in range(4)) == [(64, 64)] * 3 + [(64, 192)]
    (wide,) = [index for index in range(4) if trainer.dataset.size_of(index) == (64, 192)]
    condition = trainer.supervision.terms.encode(trainer.dataset.batch([wide]), [0]).condition
    assert condition.time_ids.tolist() == [[70, 200, 2, 0, 64, 192]]


def test_a_run_leaves_an_adapter_that_the_stock_pipeline_loads(tmp_path: Path) -> None:
    trainer: BaseTrainer = trainer_of(tmp_path, "checkpoint.save_lora=true", "training.max_steps=4")
    result = trainer.train()
    assert set(result.after) == {"unet/loss"} and result.after["unet/loss"] < result.before["unet/loss"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"unet/loss", "unet/error", "unet/grad_norm"} <= lines[1].keys()
    pipeline = build_tiny(seed=3)
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    pipeline.load_lora_weights(str(tmp_path / "run/lora/step-000004/unet"))
    own, stock = trainer.family.unet.unet, pipeline.unet
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 77, own.config["cross_attention_dim"])
    width = own.add_embedding.linear_1.in_features - 6 * own.config["addition_time_embed_dim"]
    added = {"text_embeds": torch.ones(1, width), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        ours, theirs = (net(*inputs, added_cond_kwargs=added).sample for net in (own.eval(), stock.eval()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SDXL = {"family": "sdxl", "name": "tiny-random"}
DATA = {"target_images_dir": "t"}


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("training.use_reward", {"training": {"use_reward": True}}),
        ("training.mode", {"training": {"mode": "i2i"}, "data": DATA | {"source_images_dir": "s"}}),
        ("data.target_images_dir", {"data": {}}),
        ("training.min_snr_gamma", {"model": {}, "training": {"min_snr_gamma": 5.0, "use_reward": False}}),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, changed: dict[str, Any]) -> None:
    assert path in first_paths(**({"model": SDXL, "data": DATA} | changed))


def test_sdxl_learns_from_pictures_unless_it_is_told_otherwise() -> None:
    config = Config.model_validate({"model": SDXL, "data": DATA})
    assert config.uses_supervision() and not config.training.use_reward and config.parts() == ("unet",)
    assert Config.model_validate({"model": SDXL, "training": {"method": "dpo"}}).training.use_reward, "as it was"
