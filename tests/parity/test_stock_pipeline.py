"""The same prior tokens, quoted words and noise give the stock pipeline's image, and what we save it can load."""

import numpy as np
import pytest
import torch
import transformers
from diffusers import GlmImagePipeline
from packaging.version import Version
from PIL import Image

from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.tiny import build_tiny

STEPS = 4
PROMPTS = ["a sign", 'a shop sign "OPEN"', "two signs 'left' and \"right\"", "it's Tom's sign 「你好」 “x”"]


def make_stock() -> GlmImagePipeline:
    pipeline = build_tiny()
    # Not 0 and 1, so that forgetting the normalisation shows.
    pipeline.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.5, 2.0, 1.5, 0.7])
    return pipeline


@pytest.fixture(scope="module")
def stock() -> GlmImagePipeline:
    return make_stock()


@pytest.fixture(scope="module")
def family() -> GLMImage:
    return GLMImage.from_pipeline(make_stock())


def draw(grid: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prior tokens [1, h*w] and initial noise of one image."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (1, grid[0] * grid[1]), generator=generator)
    return tokens, torch.randn(1, 4, grid[0] * 4, grid[1] * 4, generator=generator)


def make_source(grid: tuple[int, int]) -> tuple[torch.Tensor, Image.Image]:
    """A source image as our tensor [1, 3, H, W] and as the stock's PIL image, equal to the last bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (grid[0] * 32, grid[1] * 32, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, Image.fromarray(pixels)


def ours(family, prompt, tokens, noise, grid, guidance_scale, **source) -> torch.Tensor:
    condition = family.dit.condition([prompt], tokens, grid, **source)
    schedule = family.dit.schedule(STEPS, grid[0] * 32, grid[1] * 32)
    trajectory = family.dit.sample(noise, condition, schedule, guidance_scale=guidance_scale)
    return family.dit.decode_latents(trajectory.final)


def theirs(stock, prompt, tokens, noise, grid, guidance_scale, **source) -> torch.Tensor:
    return stock(
        prompt,
        height=grid[0] * 32,
        width=grid[1] * 32,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=noise,
        prior_token_ids=stock._upsample_token_ids(tokens, *grid),
        output_type="pt",
        **source,
    ).images


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("grid", [(2, 2), (3, 2)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_to_image_equals_stock(stock, family, prompt, grid, guidance_scale):
    tokens, noise = draw(grid)
    expected = theirs(stock, prompt, tokens, noise, grid, guidance_scale)
    image = ours(family, prompt, tokens, noise, grid, guidance_scale)
    assert (image - expected).abs().max() <= 1e-4
    other = ours(family, prompt, (tokens + 1) % 64, noise, grid, guidance_scale)
    assert (other - expected).abs().max() > 1e-3  # the comparison sees the tokens


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("source_grid", [(2, 2), (2, 3)])
def test_image_to_image_equals_stock(stock, family, source_grid, guidance_scale):
    """With the source's tokens handed over, which steps around the stock's own broken tokenization of it."""
    grid, prompt = (2, 3), 'make it say "HI"'
    tokens, noise = draw(grid)
    source_tokens, _ = draw(source_grid, seed=1)
    pixels, picture = make_source(source_grid)
    expected = theirs(
        stock,
        prompt,
        tokens,
        noise,
        grid,
        guidance_scale,
        image=[picture],
        prior_token_image_ids=[stock._upsample_token_ids(source_tokens, *source_grid)[0]],
        source_image_grid_thw=[torch.tensor([[1, source_grid[0] * 2, source_grid[1] * 2]])],
    )
    source = {"sources": pixels, "source_tokens": source_tokens, "source_grid": source_grid}
    image = ours(family, prompt, tokens, noise, grid, guidance_scale, **source)
    assert (image - expected).abs().max() <= 1e-4
    without = ours(family, prompt, tokens, noise, grid, guidance_scale)
    assert (without - expected).abs().max() > 1e-3  # the comparison sees the source


@pytest.mark.xfail(
    Version(transformers.__version__) >= Version("5.23"),
    strict=True,
    raises=RuntimeError,
    reason="stock i2i joins the feature maps that it should hand over one by one (diffusers 0.42.1 with transformers "
    "5.23). An XPASS means the pair is repaired: compare our i2i with the stock's end to end and drop this test",
)
def test_stock_image_to_image_runs(stock, monkeypatch):
    def write_zeros(input_ids, max_new_tokens, **_):  # random weights would end the image early, another crash
        return torch.cat([input_ids, torch.zeros(1, max_new_tokens, dtype=torch.long)], dim=1)

    monkeypatch.setattr(stock.vision_language_encoder, "generate", write_zeros)
    _, picture = make_source((16, 16))  # 512 px, so that the processor does not resize
    stock("brighter", image=[picture], height=64, width=64, num_inference_steps=1, output_type="pt")


def test_our_image_to_image_works(family):
    pixels, _ = make_source((2, 2))
    images = family.generate(["brighter"], height=64, width=64, sources=pixels, seed=0, num_inference_steps=2)
    assert images.shape == (1, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    other = family.generate(["brighter"], height=64, width=64, sources=1 - pixels, seed=0, num_inference_steps=2)
    assert not torch.equal(images, other)


def test_stock_loads_what_we_save_and_draws_the_same(family, tmp_path):
    family.save_pretrained(tmp_path)
    loaded = GlmImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    grid, source_grid = (2, 2), (2, 2)
    tokens, noise = draw(grid)
    source_tokens, _ = draw(source_grid, seed=1)
    pixels, picture = make_source(source_grid)
    text = theirs(loaded, PROMPTS[1], tokens, noise, grid, 1.5)
    assert (ours(family, PROMPTS[1], tokens, noise, grid, 1.5) - text).abs().max() <= 1e-4
    edit = theirs(
        loaded,
        PROMPTS[1],
        tokens,
        noise,
        grid,
        1.5,
        image=[picture],
        prior_token_image_ids=[loaded._upsample_token_ids(source_tokens, *source_grid)[0]],
        source_image_grid_thw=[torch.tensor([[1, 4, 4]])],
    )
    image = ours(family, PROMPTS[1], tokens, noise, grid, 1.5, sources=pixels, source_tokens=source_tokens)
    assert (image - edit).abs().max() <= 1e-4
    again = GLMImage.load(tmp_path)
    assert (ours(again, PROMPTS[1], tokens, noise, grid, 1.5) - text).abs().max() <= 1e-4


def test_stock_pipeline_over_our_modules_is_unchanged(stock, family):
    """`to_pipeline` shares modules that carry our attention processor; its own call must not notice."""
    tokens, noise = draw((2, 2))
    shared = family.to_pipeline()
    shared.set_progress_bar_config(disable=True)
    expected = theirs(stock, PROMPTS[2], tokens, noise, (2, 2), 1.5)
    assert (theirs(shared, PROMPTS[2], tokens, noise, (2, 2), 1.5) - expected).abs().max() <= 1e-4
