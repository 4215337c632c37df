"""The same prompts and noise give what the stock SDXL pipeline gives, and what we save it can load."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

from glm_training.models.lora import adapter_parameters, add_lora
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.tiny import build_tiny
from glm_training.models.sdxl.types import add_time_ids

PROMPTS = ["a red circle left of a blue square", "a cat"]


def make_stock(prediction: str = "epsilon") -> StableDiffusionXLPipeline:
    pipeline = build_tiny(prediction_type=prediction)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))


def ours(family, noise, size, guidance, negative=None, **options) -> torch.Tensor:
    unet = family.unet
    text = unet.encode_prompts(PROMPTS)
    ids = add_time_ids(size, (0, 0), size, rows=2)
    latents = unet.sample(
        noise, text, ids, steps=3, guidance_scale=guidance, negative=unet.negative_text(text, negative), **options
    )
    return unet.decode_latents(latents)


def theirs(stock, noise, size, guidance, negative=None, **options) -> torch.Tensor:
    return stock(
        PROMPTS,
        height=size[0],
        width=size[1],
        num_inference_steps=3,
        guidance_scale=guidance,
        negative_prompt=None if negative is None else [negative] * 2,
        latents=noise,
        output_type="pt",
        **options,
    ).images


def test_prompts_are_encoded_as_the_stock_does() -> None:
    stock = make_stock()
    prompts = ["a cat " * 60, "a red circle", "ünïcödé 漢字", ""]
    expected = stock.encode_prompt(prompts, device="cpu", negative_prompt=["the sign"] * 4)
    unet = SDXL.from_pipeline(stock).unet
    text = unet.encode_prompts(prompts)
    negative = unet.encode_prompts(["the sign"] * 4)
    for got, wanted in zip(
        (text.prompt_embeds, negative.prompt_embeds, text.pooled, negative.pooled), expected, strict=True
    ):
        assert torch.equal(got, wanted)
    assert text.prompt_embeds.shape == (4, 77, 64) and text.pooled.shape == (4, 32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "the sign")])
def test_sampling_equals_stock(prediction: str, guidance: float, negative: str | None) -> None:
    stock, size = make_stock(prediction), (64, 80)
    noise = draw(*size)
    expected = theirs(stock, noise.clone(), size, guidance, negative)
    family = SDXL.from_pipeline(stock)
    state, before = torch.random.get_rng_state(), (stock.scheduler.num_inference_steps, stock.scheduler.timesteps)
    image = ours(family, noise, size, guidance, negative)
    assert (image - expected).abs().max() <= 1e-4
    chunked = ours(family, noise, size, guidance, negative, micro_batch_size=1)
    assert (chunked - expected).abs().max() <= 1e-4
    assert torch.equal(torch.random.get_rng_state(), state)
    assert stock.scheduler.num_inference_steps == before[0] and stock.scheduler.timesteps is before[1]
    other = ours(family, noise.flip(0), size, guidance, negative)
    assert (other - expected).abs().max() > 1e-3  # the comparison sees the noise


def test_a_scheduler_that_draws_noise_draws_it_from_the_rows_generators() -> None:
    stock = make_stock()
    stock.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config)
    family, noise = SDXL.from_pipeline(stock), draw(64, 64)
    state = torch.random.get_rng_state()

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    expected = theirs(stock, noise.clone(), (64, 64), 5.0, generator=seeded(1, 2))
    image = ours(family, noise, (64, 64), 5.0, generators=seeded(1, 2))
    assert (image - expected).abs().max() <= 1e-4
    chunked = ours(family, noise, (64, 64), 5.0, generators=seeded(1, 2), micro_batch_size=1)
    assert (chunked - expected).abs().max() <= 1e-4
    assert (ours(family, noise, (64, 64), 5.0, generators=seeded(3, 4)) - expected).abs().max() > 1e-3
    unseeded = ours(family, noise, (64, 64), 5.0)
    assert torch.equal(ours(family, noise, (64, 64), 5.0), unseeded)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_exported_adapter_in_a_fresh_stock_pipeline_draws_the_same(tmp_path) -> None:
    family, size = SDXL.from_pipeline(make_stock()), (64, 64)
    noise = draw(*size)
    before = ours(family, noise, size, 5.0)
    add_lora(family.module("unet"), family.lora_targets("unet"), rank=4, alpha=6)
    generator = torch.Generator().manual_seed(1)
    for name, param in adapter_parameters(family.module("unet")).items():
        if "lora_B" in name:
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    image = ours(family, noise, size, 5.0)
    assert (image - before).abs().max() > 1e-2
    family.save_lora("unet", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = make_stock()
    fresh.load_lora_weights(tmp_path)
    assert (theirs(fresh, noise.clone(), size, 5.0) - image).abs().max() <= 1e-4
    (config,) = fresh.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 6)
    fresh.unload_lora_weights()
    assert (theirs(fresh, noise.clone(), size, 5.0) - before).abs().max() <= 1e-4


def test_stock_loads_what_we_save_and_draws_the_same(tmp_path) -> None:
    family, size = SDXL.load("tiny-random", seed=3, taesd="tiny-random"), (64, 64)
    noise = draw(*size)
    add_lora(family.module("unet"), family.lora_targets("unet"), rank=2, alpha=4)
    for param in adapter_parameters(family.module("unet")).values():
        param.data.fill_(0.05)
    with pytest.raises(ValueError, match="merge_lora=True"):
        family.save_pretrained(tmp_path)
    family.save_pretrained(tmp_path, merge_lora=True)
    image = ours(family, noise, size, 5.0)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (theirs(loaded, noise.clone(), size, 5.0) - image).abs().max() <= 1e-4
    again = SDXL.load(tmp_path)
    assert (ours(again, noise, size, 5.0) - image).abs().max() <= 1e-4
    latents = torch.ones(1, 4, 8, 8)
    assert torch.equal(again.unet.decode_latents(latents, taesd=True), family.unet.decode_latents(latents, taesd=True))
