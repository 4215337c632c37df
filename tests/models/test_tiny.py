"""The shipped tiny model: small, loaded by the stock pipeline, and able to draw what it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import GlmImagePipeline

from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.loading import load_pipeline
from glm_training.models.glm_image.tiny import TINY_FOLDER, build_tiny

ROOT = Path(__file__).parents[2]


def test_it_takes_at_most_20_megabytes():
    assert sum(path.stat().st_size for path in TINY_FOLDER.rglob("*") if path.is_file()) <= 20e6


def test_the_stock_pipeline_loads_it_and_draws():
    pipeline = GlmImagePipeline.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "a red circle left of a blue square", height=128, width=128, num_inference_steps=4, generator=generator
    ).images[0]
    assert image.size == (128, 128)
    assert image.getextrema() != ((0, 0),) * 3


def test_it_draws_better_than_chance_and_not_perfectly_on_held_out_prompts():
    from examples.tiny_glm_image.checker import SceneReward
    from glm_training.rewards import RewardBatch, word_accuracy

    prompts = (ROOT / "data/t2i/held_out/prompts.txt").read_text().splitlines()
    family = GLMImage.load("tiny")
    images = family.generate(prompts, height=128, width=128, seed=1, num_inference_steps=8, guidance_scale=1.0)
    scenes = SceneReward().compute_rewards(RewardBatch(images, prompts)).total
    words = word_accuracy(images, prompts)
    assert 0.3 <= scenes.mean() < 1.0
    assert 0.1 <= words.nanmean() < 1.0


def test_random_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    first, second, other = build_tiny(seed=1), build_tiny(seed=1), build_tiny(seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    for name in ("vision_language_encoder", "transformer", "vae", "text_encoder"):
        left, right, different = (getattr(p, name).state_dict() for p in (first, second, other))
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert any(not torch.equal(left[key], different[key]) for key in left)


def test_half_precision_is_of_the_weights_alone():
    """A rotary frequency of 8 bits is a radian off at position 500."""
    pipeline = load_pipeline("tiny-random", dtype=torch.bfloat16)
    for name in ("vision_language_encoder", "transformer", "vae", "text_encoder"):
        network = getattr(pipeline, name)
        assert {param.dtype for param in network.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in network.buffers()} <= {torch.float32}
    assert "rotary_emb.inv_freq" in " ".join(dict(pipeline.vision_language_encoder.named_buffers()))


@pytest.mark.parametrize("text", ["a red circle", "ünïcödé 漢字", '"CAFE" — 50 %'])
def test_its_tokenizer_keeps_any_text(text):
    tokenizer = build_tiny().processor.tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
