"""Features are those of the vision-language models themselves, with their weights and their own preprocessing."""

from __future__ import annotations

import pytest
import torch
from transformers import InternVLConfig, InternVLModel, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessor

from glm_training.models.vgt.tower import InternVLTower, Qwen25VLTower, pixel_shuffle

VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[32, 32],
    patch_size=[4, 4], attention_bias=True,
)  # fmt: skip
TEXT = dict(
    vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip
QWEN_VISION = dict(
    depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1],
)  # fmt: skip


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight away from its initial zero or one, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator))
    return model.eval()


def pictures(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    """Dark, coloured ones: no value near the ends of the range tells how they are scaled."""
    return 0.2 + 0.3 * torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_internvl_features_are_those_of_transformers() -> None:
    text = {"model_type": "qwen2", **TEXT}
    model = scattered(InternVLModel(InternVLConfig(vision_config=VISION, text_config=text, image_token_id=1)))
    tower = InternVLTower(VISION, 24).eval()
    tower.encoder.load_state_dict(model.vision_tower.state_dict())
    tower.projector.load_state_dict(model.multi_modal_projector.state_dict())
    images = pictures((32, 32))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images - mean[:, None, None]) / std[:, None, None]
    theirs = model.get_image_features(
        pixels, vision_feature_layer=-1, vision_feature_select_strategy="default", return_dict=True
    ).pooler_output
    ours = tower(images)
    assert ours.shape == (2, 16, 24) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(112, 112), (84, 140)])
def test_qwen_features_are_those_of_transformers(size) -> None:
    """Its own image processor cuts the patches there, from 8-bit pictures."""
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
    config = Qwen2_5_VLConfig(vision_config={**QWEN_VISION, "out_hidden_size": 24}, text_config=text)
    model = scattered(Qwen2_5_VLModel(config))
    tower = Qwen25VLTower(QWEN_VISION, 24).eval()
    tower.encoder.load_state_dict(model.visual.state_dict())
    levels = (pictures(size) * 255).round().to(torch.uint8)
    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=448 * 448)
    inputs = processor(images=list(levels), return_tensors="pt")
    theirs = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    ours = tower(levels.float() / 255)
    assert ours.shape == (2, size[0] * size[1] // 28**2, 24) and ours.std() > 0.1
    torch.testing.assert_close(ours, torch.stack(list(theirs)), atol=1e-5, rtol=1e-5)


def test_pixel_shuffle_lays_each_block_side_by_side() -> None:
    """4 x 6 places of two channels, the place (row, column) holding (10 row + column, its negative)."""
    places = 10 * torch.arange(4)[:, None] + torch.arange(6)
    shuffled = pixel_shuffle(torch.stack([places, -places], dim=-1)[None])
    assert shuffled.shape == (1, 6, 8)
    assert shuffled[0, 0].tolist() == [0, 0, 1, -1, 10, -10, 11, -11]
    assert shuffled[0, 1].tolist() == [2, -2, 3, -3, 12, -12, 13, -13], "the next place of the row"
    assert shuffled[0, 3].tolist() == [20, -20, 21, -21, 30, -30, 31, -31], "the first place of the next row"


def test_dropout_of_a_checkpoints_config_is_off() -> None:
    tower = InternVLTower({**VISION, "hidden_dropout_prob": 0.5, "attention_dropout": 0.5}, 24).train()
    images = pictures((32, 32))
    assert torch.equal(tower(images), tower(images))


def test_sides_that_do_not_fit_are_named() -> None:
    tower = InternVLTower(VISION, 24)
    for shape in ((1, 3, 32, 36), (1, 3, 28, 32), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"multiples of 8, got \[" + ", ".join(map(str, shape))):
            tower(torch.zeros(shape))
