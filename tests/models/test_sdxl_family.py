"""The SDXL family: where it loads from, what it says when it cannot, its adapters, and images named by their seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_training.models.family import Sampling
from glm_training.models.lora import (
    adapter_parameters,
    adapters_disabled,
    adapters_scaled,
    add_lora,
    load_lora,
    save_lora,
)
from glm_training.models.sdxl.family import SDXL, ModelLoadError
from glm_training.models.sdxl.tiny import build_tiny, build_tiny_taesd
from glm_training.models.sdxl.types import add_time_ids
from glm_training.models.snapshot import ParameterSnapshot


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    build_tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A pipeline folder to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def adapted(family: SDXL) -> torch.nn.Module:
    module = family.module("unet")
    add_lora(module, family.lora_targets("unet"), rank=2, alpha=4)
    for name, param in adapter_parameters(module).items():
        if "lora_B" in name:
            param.data.fill_(0.1)
    return module


def prediction(family: SDXL) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, ids = family.unet.encode_prompts(["a cat"]), add_time_ids((64, 64), (0, 0), (64, 64))
    with torch.no_grad():
        return family.unet(latents, torch.tensor([500]), text, ids)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_broken_folders_are_explained(folder) -> None:
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000])
    with pytest.raises(ModelLoadError, match="cannot load the folder"):
        SDXL.load(folder)
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"(?s)cannot load the folder.*unet holds no weights as safetensors"):
        SDXL.load(folder)
    for name in ("vae", "tokenizer_2"):
        shutil.rmtree(folder / name)
    with pytest.raises(ModelLoadError, match="lacks the folders vae, tokenizer_2"):
        SDXL.load(folder)
    index.write_text(json.dumps(content | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ModelLoadError, match="declares a FluxPipeline, not a StableDiffusionXLPipeline"):
        SDXL.load(folder)
    index.write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        SDXL.load(folder)
    index.unlink()
    with pytest.raises(ModelLoadError, match="(?s)no model_index.json.*stabilityai/stable-diffusion-xl-base-1.0"):
        SDXL.load(folder)


def test_a_folder_that_is_another_kind_of_sdxl_is_explained(folder) -> None:
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ModelLoadError, match="cannot use .* as an SDXL: .*prediction_type 'sample'"):
        SDXL.load(folder)


def test_names_that_lead_nowhere_are_explained(tmp_path) -> None:
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="single file.*from_single_file"):
        SDXL.load(single)
    with pytest.raises(ModelLoadError, match="neither a folder here nor a hub id"):
        SDXL.load("./nowhere")
    with pytest.raises(ModelLoadError, match="(?s)hf download some-owner/some-model.*model.local_files_only"):
        SDXL.load("some-owner/some-model", local_files_only=True)
    with pytest.raises(ModelLoadError, match="no config.json.*madebyollin/taesdxl"):
        SDXL.load("tiny-random", taesd=tmp_path)
    with pytest.raises(ModelLoadError, match="some-owner/some-taesd"):
        SDXL.load("tiny-random", taesd="some-owner/some-taesd", local_files_only=True)


def test_the_files_that_suit_the_dtype_are_taken(folder) -> None:
    full = folder / "unet/diffusion_pytorch_model.safetensors"
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    weights = {name: value.half() for name, value in load_file(full).items()}
    weights["conv_in.bias"] = torch.full_like(weights["conv_in.bias"], 0.5)  # tells the two files apart
    save_file(weights, half, metadata={"format": "pt"})

    def took_half(dtype: torch.dtype) -> bool:
        bias = SDXL.load(folder, dtype=dtype).module("unet").conv_in.bias
        assert bias.dtype == dtype
        return bool((bias == 0.5).all())

    assert [took_half(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)] == [False, True, True]
    full.unlink()
    assert took_half(torch.float32)
    half.rename(full)
    assert took_half(torch.float16)


def test_taesd_comes_from_where_it_is_said_to(folder, tmp_path) -> None:
    assert SDXL.load(folder).unet.taesd is None
    build_tiny_taesd(seed=1).save_pretrained(tmp_path / "small")
    build_tiny_taesd(seed=2).save_pretrained(folder / "taesd")
    latents = torch.ones(1, 4, 8, 8)
    inside, named = (SDXL.load(folder, taesd=taesd).unet for taesd in (None, tmp_path / "small"))
    first, second = (SDXL.from_pipeline(build_tiny(), build_tiny_taesd(seed=seed)).unet for seed in (2, 1))
    assert torch.equal(inside.decode_latents(latents, taesd=True), first.decode_latents(latents, taesd=True))
    assert torch.equal(named.decode_latents(latents, taesd=True), second.decode_latents(latents, taesd=True))


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_disabled_adapter_is_the_frozen_base_bit_for_bit() -> None:
    family, frozen = SDXL.load("tiny-random"), SDXL.load("tiny-random")
    module = adapted(family)
    family.set_trainable(unet=True)
    assert set(family.trainable("unet")) == set(adapter_parameters(module))
    assert all(name.split(".lora_")[0].endswith(family.lora_targets("unet")) for name in family.trainable("unet"))
    assert not torch.equal(prediction(family), prediction(frozen))
    with adapters_disabled(module):
        assert torch.equal(prediction(family), prediction(frozen))


def test_a_snapshot_of_the_whole_unet_is_its_frozen_copy() -> None:
    family, frozen = SDXL.load("tiny-random"), SDXL.load("tiny-random")
    family.set_trainable(unet=True)
    snapshot = ParameterSnapshot(family.trainable("unet"))
    with torch.no_grad():
        for param in family.trainable("unet").values():
            param.add_(0.01)
    assert not torch.equal(prediction(family), prediction(frozen))
    with snapshot.applied():
        assert torch.equal(prediction(family), prediction(frozen))


def test_scaled_adapters_lie_between_base_and_full() -> None:
    family = SDXL.load("tiny-random")
    base = prediction(family)
    with pytest.raises(ValueError, match="no LoRA"), adapters_scaled(family.module("unet"), 0.5):
        pass
    module = adapted(family)
    full = prediction(family)
    with adapters_scaled(module, 0.0):
        assert torch.equal(prediction(family), base)
    with adapters_scaled(module, 0.25):
        quarter = prediction(family)
        with adapters_scaled(module, 4.0):
            assert torch.equal(prediction(family), full)
    assert torch.equal(prediction(family), full)
    for param in adapter_parameters(module).values():
        param.data.mul_(0.5)  # A and B by a half each: B A by a quarter
    torch.testing.assert_close(prediction(family), quarter, atol=1e-5, rtol=0)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be"), adapters_scaled(module, scale):
            pass


def test_peft_folder_goes_out_and_comes_back(tmp_path) -> None:
    family = SDXL.load("tiny-random")
    with pytest.raises(ValueError, match="no LoRA adapters"):
        family.save_lora("unet", tmp_path)
    module = adapted(family)
    save_lora(module, tmp_path)
    fresh = SDXL.load("tiny-random")
    load_lora(fresh.module("unet"), tmp_path)
    assert torch.equal(prediction(fresh), prediction(family))
    with pytest.raises(ValueError, match="one of unet"):
        family.module("dit")  # type: ignore[arg-type]


# -- images ------------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_own_name_alone() -> None:
    family = SDXL.load("tiny-random")
    state, steps = torch.random.get_rng_state(), []
    options = {"height": 64, "width": 64, "seed": 1, "num_inference_steps": 2}
    images = family.generate(["a cat", "a sign"], renders=2, on_step=steps.append, **options)
    assert images.shape == (4, 3, 64, 64) and steps == [0, 1]
    alone = family.generate(["a sign"], prompt_ids=[1], renders=2, micro_batch_size=1, **options)
    torch.testing.assert_close(alone, images[2:], atol=1e-4, rtol=0)
    assert len({tuple(image.flatten()[:9].tolist()) for image in images}) == 4
    assert not torch.equal(family.generate(["a sign"], prompt_ids=[1], renders=2, **(options | {"seed": 2})), alone)
    away = family.generate(["a sign"], prompt_ids=[1], renders=2, negative_prompt="a cat", **options)
    assert (away - alone).abs().max() > 1e-4
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="one prompt_id per prompt"):
        family.generate(["a cat"], prompt_ids=[1, 2], **options)
    assert family.pipeline_bytes() == sum(p.numel() * 4 for p in family.unet.parameters())


def test_drawing_hands_on_all_that_it_is_asked(monkeypatch) -> None:
    family, given = SDXL.load("tiny-random"), []
    monkeypatch.setattr(family, "generate", lambda *arguments, **named: given.append((arguments, named)))
    sampling, steps = Sampling(0.3, 0.4, False, 7, 2.5), []
    named = {"height": 64, "width": 96, "seed": 5, "prompt_ids": [8, 9], "micro_batch_size": 3, "vae_batch_size": 2}
    family.draw(["a", "b"], sampling=sampling, samples=4, on_step=lambda: steps.append("step"), **named)
    ((prompts,), told) = given[0]
    told.pop("on_step")(11)
    assert prompts == ["a", "b"] and steps == ["step"]
    assert told == named | {"renders": 4, "num_inference_steps": 7, "guidance_scale": 2.5}
    family.draw(["a"], height=64, width=64, seed=0, sampling=sampling)
    assert (given[1][1]["renders"], given[1][1]["on_step"], given[1][1]["prompt_ids"]) == (1, None, None)
    with pytest.raises(ValueError, match="cannot edit source images"):
        family.draw(["a"], height=64, width=64, seed=0, sampling=sampling, sources=torch.zeros(1, 3, 64, 64))
