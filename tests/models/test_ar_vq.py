"""Image tokenisation against the stock path: processor, vision tower and codebook, one image at a time."""

import pytest
import torch
from PIL import Image

from glm_training.models.glm_image import vq
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import build_tiny


@pytest.fixture(scope="module")
def ar():
    pipeline = build_tiny()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a position embedding that matters
        weight = pipeline.vision_language_encoder.model.visual.embeddings.position_embedding.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return ARComponent(pipeline.vision_language_encoder, pipeline.processor)


def pictures(count, height, width):
    """Float images [count, 3, height, width] of 8-bit values: smooth, so that resizing does not wash them out."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return images.mul(255).round() / 255


def stock_tokens(ar, pixels, **options):
    """Ids [rows*columns] and grid of one uint8 image [3, H, W], the stock way."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    inputs = ar.processor.image_processor(images=[image], return_tensors="pt", **options)
    features = ar.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    features = torch.cat(features) if isinstance(features, tuple) else features  # of each image, before 5.23
    return ar.model.get_image_tokens(features, inputs["image_grid_thw"]), tuple(
        inputs["image_grid_thw"][0, 1:].tolist()
    )


@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 768), (1024, 544)])
def test_a_size_the_processor_keeps_gives_the_stock_tokens(ar, height, width):
    images = pictures(2, height, width)
    tokens = ar.tokenize_images(images, (height // 32, width // 32))
    assert tokens.dtype == torch.long and len(tokens.unique()) > 5
    for image, ours in zip(images.mul(255).byte(), tokens, strict=True):
        expected, grid = stock_tokens(ar, image)
        assert grid == (height // 32, width // 32)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (8, 22), (3, 1)])
def test_any_grid_gives_the_stock_tokens_of_the_resized_image(ar, grid):
    images = pictures(3, 128, 160)
    tokens = ar.tokenize_images(images, grid)
    resized = vq.vision_pixels(images, grid, ar.processor.image_processor)
    assert resized.shape == (3, 3, grid[0] * 16, grid[1] * 16)
    for image, ours in zip(resized, tokens, strict=True):
        expected, stock_grid = stock_tokens(ar, image, do_resize=False)
        assert stock_grid == grid
        assert torch.equal(ours, expected)


def test_pixels_are_rounded_to_8_bits(ar):
    images = torch.tensor([200.7, 0.4, -3.0, 300.0]).view(4, 1, 1, 1).expand(4, 3, 16, 16) / 255
    pixels = vq.vision_pixels(images, (1, 1), ar.processor.image_processor)
    assert pixels[:, 0, 0, 0].tolist() == [201, 0, 0, 255]


def test_passes_of_several_images_are_joined_in_order(ar, monkeypatch):
    images = pictures(5, 96, 128)
    whole = ar.tokenize_images(images, (3, 4))
    monkeypatch.setattr(vq, "TOKENS_PER_PASS", 24)
    assert torch.equal(ar.tokenize_images(images, (3, 4)), whole)
    monkeypatch.setattr(vq, "TOKENS_PER_PASS", 1)
    assert torch.equal(ar.tokenize_images(images, (3, 4)), whole)


def test_autocast_and_gradients_do_not_reach_the_tokens(ar):
    images = pictures(2, 128, 128).requires_grad_()
    expected = ar.tokenize_images(images, (16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ar.tokenize_images(images, (16, 16)), expected)
    assert not expected.requires_grad


def test_targets_are_the_preview_then_the_large_grid(ar):
    images = pictures(2, 128, 192)
    prompt = ar.encode_prompts(["a", "bc"], 128, 192)
    targets = ar.targets(images, prompt)
    assert prompt.grids == ((13, 19), (4, 6)) and targets.shape == (2, prompt.T)
    assert torch.equal(targets[:, : prompt.preview_length], ar.tokenize_images(images, (13, 19)))
    assert torch.equal(targets[:, prompt.preview_length :], ar.tokenize_images(images, (4, 6)))
    edited = ar.encode_prompts(["a", "bc"], 128, 192, images)
    assert torch.equal(ar.targets(images, edited), targets[:, prompt.preview_length :])
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        ar.targets(images[:1], prompt)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
)
def test_other_image_layouts_are_refused(ar, images):
    with pytest.raises(ValueError, match=r"float \[B, 3, H, W\]"):
        ar.tokenize_images(images, (2, 2))
    with pytest.raises(ValueError, match="at least one row"):
        ar.tokenize_images(torch.zeros(1, 3, 64, 64), (0, 2))
