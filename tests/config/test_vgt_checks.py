"""What VGT's two models ask of the other sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_training.config import Config, load_config
from tests.config.building import first_paths


def sections(component: str = "autoencoder", **changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {
        "model": {"family": "vgt", "component": component, "name": "tiny"},
        "data": {"images": "pictures"},
        "reward": {},
    }
    return {name: tree.get(name, {}) | changed.get(name, {}) for name in {*tree, *changed}}


AUTOENCODER_RUNS = {"batch_size": 128, "steps": 100_000, "beta2": 0.95, "decay": 1e-4, "warmup": 3000, "clip": 1.0}
AUTOENCODER_RUNS |= {"save": 10_000, "judge": 10_000, "sample": 5000, "average": None}
GENERATOR_RUNS = {"batch_size": 256, "steps": 100_000, "beta2": 0.95, "decay": 0.05, "warmup": 1000, "clip": 1.0}
GENERATOR_RUNS |= {"save": 5000, "sample": 2000, "average": (0.9998, 10_000)}
PUBLISHED: dict[str, dict[str, Any]] = {
    "vgt_ae_stage1": AUTOENCODER_RUNS | {"rates": (3e-4, 1e-4), "gan": 30_000, "norm": False, "noise": 0.0, "w_d": 1.0},
    "vgt_ae_stage2": AUTOENCODER_RUNS | {"rates": (1e-4, 1e-5), "gan": 10_000, "norm": True, "noise": 0.1, "w_d": 0.1},
    "vgt_ar_pretrain": GENERATOR_RUNS | {"rates": (3e-4, 1e-4)},
    "vgt_ar_pretrain_1_6b": GENERATOR_RUNS | {"rates": (3e-4, 1e-4), "batch_size": 512, "steps": 50_000},
    # an average that sets out at step 10,000 is none
    "vgt_ar_sft": GENERATOR_RUNS | {"rates": (1e-4, 5e-5), "steps": 5000, "warmup": 50, "save": 2000, "average": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_have_the_published_numbers(name: str) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    training, logging, vgt, ema = config.training, config.logging, config.vgt, config.training.ema
    optimizer = config.optimizer_for(config.parts()[0])
    found: dict[str, Any] = {
        "batch_size": 8 * training.batch_size * training.gradient_accumulation_steps,
        "steps": training.max_steps,
        "rates": pytest.approx((optimizer.learning_rate, optimizer.learning_rate * optimizer.min_lr_ratio), rel=1e-5),
        "beta2": optimizer.beta2,
        "decay": optimizer.weight_decay,
        "warmup": optimizer.warmup_steps,
        "clip": optimizer.max_grad_norm,
        "save": logging.save_interval,
        "sample": logging.sample_every(),
        "average": None if ema.decay is None else (ema.decay, ema.start_step),
    }
    if config.model.component == "autoencoder":
        found |= {"judge": logging.eval_interval, "gan": vgt.gan.start_step, "norm": vgt.channel_norm}
        found |= {"noise": vgt.latent_noise, "w_d": vgt.distillation_weight}
        assert (vgt.encoder_rate_ratio, vgt.perceptual_weight, vgt.gan.weight, vgt.gan.lecam_weight, vgt.kl_weight) == (
            0.5, 1.1, 0.1, 1e-3, 1e-6,
        )  # fmt: skip
        assert config.data.augmentation and (vgt.gan.channels, vgt.gan.stages) == (128, 3)
    else:
        assert name == "vgt_ar_sft" or (vgt.caption_dropout, vgt.timestep_shift, vgt.order) == (0.1, 1.4, "random")
    assert (optimizer.name, optimizer.beta1, optimizer.scheduler) == ("adamw", 0.9, "cosine")
    assert (config.data.image_size.height, config.data.image_size.width, config.data.crop) == (448, 448, "random")
    assert found == PUBLISHED[name]


def test_captioned_images_are_all_it_needs() -> None:
    config = Config.model_validate(sections())
    assert config.parts() == ("autoencoder",) and config.data.prompts_file is None
    assert not (config.uses_reward() or config.uses_supervision() or config.reward.enabled)
    bare = Config.model_validate({"model": {"family": "vgt"}, "data": {"images": "pictures"}})
    assert (bare.model.component, bare.model.name) == ("generator", "OpenGVLab/InternVL3-1B-hf")
    assert (bare.data.image_size.height, bare.data.image_size.width) == (448, 448)
    sampling = bare.evaluation_sampling()
    assert (sampling.num_inference_steps, sampling.guidance_scale, sampling.parallel) == (30, 4.5, 1)
    assert bare.optimizer_for("generator").learning_rate == 3e-4
    assert Config.model_validate(sections()).data.image_size.height == 64


def test_a_generator_learns_pictures_of_its_autoencoders_size(tmp_path) -> None:
    """Whatever `model.name` is: it may be a language model, or a generator whose autoencoder is elsewhere."""
    for place in ("bare", "pipeline/autoencoder", "step/pipeline/autoencoder"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text('{"image_size": 96}')
    (tmp_path / "published.pth").touch()
    for name, wanted in (("bare", 96), ("pipeline", 96), ("step", 96), ("published.pth", 448)):
        config = Config.model_validate(sections("generator", vgt={"autoencoder": str(tmp_path / name)}))
        assert (config.data.image_size.height, config.data.image_size.width) == (wanted, wanted)
    assert Config.model_validate(sections("generator")).data.image_size.height == 64


@pytest.mark.parametrize(
    ("path", "component", "changed"),
    [
        ("model.component", "unet", {}),
        ("model.component", "both", {}),
        ("training.use_reward", "generator", {"training": {"use_reward": True}}),
        ("training.method", "generator", {"training": {"method": "dpo"}}),
        ("training.mode", "generator", {"training": {"mode": "i2i"}}),
        ("training.ar_learning_rate", "generator", {"training": {"ar_learning_rate": 1e-3}}),
        ("training.mixed_precision", "autoencoder", {"training": {"mixed_precision": "fp16"}}),
        ("lora.enabled", "generator", {"lora": {"enabled": True}}),
        ("data.images", "generator", {"data": {"images": None}}),
        ("model.taesd", "generator", {"model": {"family": "vgt", "component": "generator", "taesd": "x"}}),
        ("vgt.latent_noise", "generator", {"vgt": {"latent_noise": 0.1}}),
        ("vgt.gan", "generator", {"vgt": {"gan": {"start_step": 3}}}),
        ("vgt.gan", "autoencoder", {"vgt": {"gan": {"weight": 0.3}}}),
        ("vgt.caption_dropout", "autoencoder", {"vgt": {"caption_dropout": 0.2}}),
        ("vgt.autoencoder", "autoencoder", {"vgt": {"autoencoder": "x"}}),
        ("vgt.perceptual_weight", "autoencoder", {"vgt": {"perceptual_weight": 2.0}}),
        ("vgt.repa.weight", "generator", {"vgt": {"repa": {"weight": 0.4}}}),
        ("evaluation.num_inference_steps", "generator", {"evaluation": {"num_inference_steps": 1}}),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, component: str, changed: dict[str, Any]) -> None:
    assert path in first_paths(**sections(component, **changed))


def test_a_wrong_component_is_the_one_thing_told() -> None:
    """What only the right one reads is not called useless beside it."""
    tree = sections("ar", vgt={"autoencoder": "runs/ae", "caption_dropout": 0.2})
    assert first_paths(**tree) == ["model.component"]


def test_other_families_have_no_use_for_the_section() -> None:
    glm = {"model": {"family": "glm_image"}, "data": {"target_images_dir": "x"}}
    assert first_paths(**glm, vgt={"latent_noise": 0.1}) == ["vgt"]
    assert "model.component" in first_paths(**glm | {"model": {"component": "generator"}})
