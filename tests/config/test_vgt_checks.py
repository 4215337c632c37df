"""What VGT's two models ask of the other sections."""

from __future__ import annotations

from typing import Any

import pytest

from glm_training.config import Config
from tests.config.building import first_paths


def sections(component: str = "autoencoder", **changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {
        "model": {"family": "vgt", "component": component, "name": "tiny"},
        "data": {"images": "pictures"},
        "reward": {},
    }
    return {name: tree.get(name, {}) | changed.get(name, {}) for name in {*tree, *changed}}


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


def test_other_families_have_no_use_for_the_section() -> None:
    glm = {"model": {"family": "glm_image"}, "data": {"target_images_dir": "x"}}
    assert first_paths(**glm, vgt={"latent_noise": 0.1}) == ["vgt"]
    assert "data.images" in first_paths(model={"family": "glm_image"}, data={"images": "x"})
    assert "model.component" in first_paths(**glm | {"model": {"component": "generator"}})
