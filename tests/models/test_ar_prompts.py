"""Prompts: token ids, masks and positions against those of the stock pipeline."""

import warnings

import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import build_tiny

SHORT, LONG = "a red circle", 'a sign that says "hello" next to a blue square'


@pytest.fixture(scope="module")
def ar():
    pipeline = build_tiny()
    return ARComponent(pipeline.vision_language_encoder, pipeline.processor)


def stock_inputs(ar, prompts, height, width, sources=None):
    """What `GlmImagePipeline.generate_prior_tokens` hands to `generate`."""
    conversations = []
    for row, text in enumerate(prompts):
        content = [{"type": "text", "text": text}]
        if sources is not None:
            pixels = sources[row].mul(255).round().byte().permute(1, 2, 0).numpy()
            content.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
        conversations.append([{"role": "user", "content": content}])
    return ar.processor.apply_chat_template(
        conversations,
        tokenize=True,
        padding=len(prompts) > 1,
        target_h=height,
        target_w=width,
        return_dict=True,
        return_tensors="pt",
    )


def stock_positions(ar, inputs):
    positions, _ = ar.model.model.get_rope_index(
        inputs["input_ids"], inputs["image_grid_thw"], inputs["images_per_sample"], inputs["attention_mask"]
    )
    return positions, ar.model.model._cached_decode_position_ids.permute(1, 0, 2)[:, :, :-1]


@pytest.mark.parametrize("prompts", [[SHORT], [SHORT, LONG], [LONG, SHORT, ""]])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (1024, 512)])
def test_t2i_inputs_equal_the_stock_pipelines(ar, prompts, height, width):
    inputs = stock_inputs(ar, prompts, height, width)
    prompt = ar.encode_prompts(prompts, height, width)
    assert torch.equal(prompt.input_ids, inputs["input_ids"])
    assert torch.equal(prompt.attention_mask, inputs["attention_mask"])
    positions, decoding = stock_positions(ar, inputs)
    assert torch.equal(prompt.position_ids, positions)
    assert torch.equal(prompt.decode_position_ids, decoding)
    assert prompt.T == decoding.shape[2] and prompt.large_grid == (height // 32, width // 32)
    assert prompt.padded == (len(prompts) > 1)
    assert len(prompt) == len(prompts) and prompt.source_tokens is None


@pytest.mark.parametrize("prompts", [[SHORT], [SHORT, LONG]])
@pytest.mark.parametrize("source_size", [(512, 512), (512, 640), (1024, 512)])
def test_i2i_inputs_equal_the_stock_pipelines_with_the_source_tokenised_once(ar, prompts, source_size):
    sources = torch.rand(len(prompts), 3, *source_size, generator=torch.Generator().manual_seed(0))
    inputs = stock_inputs(ar, prompts, 256, 384, sources)
    grid = (source_size[0] // 32, source_size[1] // 32)
    sizes = torch.tensor([[1, *grid]] * len(prompts))
    features = ar.model.get_image_features(inputs["pixel_values"], sizes)
    seen = features.pooler_output  # of each image, before transformers 5.23
    seen = torch.cat(seen) if isinstance(seen, tuple) else seen
    image_ids = ar.model.get_image_tokens(seen, sizes).view(len(prompts), -1)
    placeholders = inputs["input_ids"] == ar.model.config.image_token_id

    prompt = ar.encode_prompts(prompts, 256, 384, sources)

    assert torch.equal(prompt.input_ids, inputs["input_ids"].masked_scatter(placeholders, image_ids))
    assert torch.equal(prompt.attention_mask, inputs["attention_mask"])
    assert torch.equal(prompt.source_tokens, image_ids) and prompt.source_grid == grid
    positions, decoding = stock_positions(ar, inputs)
    assert torch.equal(prompt.position_ids, positions)
    assert torch.equal(prompt.decode_position_ids, decoding)
    assert prompt.grids == ((8, 12),) and prompt.preview_length == 0


def test_a_small_source_keeps_its_own_grid(ar, monkeypatch):
    """With GLM-Image's limits the stock processor enlarges 64x96 px to 512x768: 384 tokens where the DiT sees 2x3."""
    limits = SizeDict(shortest_edge=512**2, longest_edge=2048**2)
    monkeypatch.setattr(ar.processor.image_processor, "size", limits)
    sources = torch.rand(1, 3, 64, 96)
    prompt = ar.encode_prompts([SHORT], 128, 128, sources)
    assert prompt.source_grid == (2, 3)
    assert torch.equal(prompt.source_tokens, ar.tokenize_images(sources, (2, 3)))
    assert stock_inputs(ar, [SHORT], 128, 128, sources)["image_grid_thw"][0].tolist() == [1, 16, 24]


def test_the_template_is_applied_without_warnings(ar, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ar.encode_prompts([SHORT, LONG], 128, 128, torch.rand(2, 3, 64, 64))
    assert not caplog.records


def test_prompts_can_be_selected_and_repeated(ar):
    prompt = ar.encode_prompts([SHORT, LONG], 64, 64, torch.rand(2, 3, 64, 64))
    group = prompt.repeat_interleave(2)
    assert len(group) == 4 and group.decode_position_ids.shape == (3, 4, 4)
    assert torch.equal(group.input_ids, prompt.input_ids[[0, 0, 1, 1]])
    assert torch.equal(group.position_ids, prompt.position_ids[:, [0, 0, 1, 1]])
    one = group.select(torch.tensor([False, False, True, False]))
    assert torch.equal(one.source_tokens, prompt.source_tokens[1:]) and one.T == prompt.T
    assert one.to("cpu").grids == prompt.grids


def test_padding_that_all_rows_share_is_not_read(ar):
    together, alone = ar.encode_prompts([SHORT, LONG, SHORT], 64, 64), ar.encode_prompts([SHORT], 64, 64)
    short, padded = together.select(torch.tensor([0, 2])).trimmed()
    assert not padded and torch.equal(short.input_ids, alone.input_ids.expand(2, -1))
    assert torch.equal(short.position_ids, alone.position_ids.expand(-1, 2, -1))
    whole, padded = together.trimmed()
    assert padded and torch.equal(whole.input_ids, together.input_ids)
    tokens = torch.arange(alone.T)[None] % ar.num_codes
    scored = ar(together.select(torch.tensor([0])), tokens)
    torch.testing.assert_close(scored, ar(alone, tokens), rtol=0, atol=0)
    beside = ar(together, tokens.expand(3, -1))[:1]
    torch.testing.assert_close(scored, beside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["a <|image|> here", "<|dit_token_64|>", "end<|dit_token_65|>"])
def test_a_prompt_that_spells_image_tokens_is_refused(ar, text):
    with pytest.raises(ValueError, match=r"prompt 1 .*reserved token"):
        ar.encode_prompts([SHORT, text], 128, 128)


def test_bad_sizes_and_counts_are_refused(ar):
    with pytest.raises(ValueError, match="height is 100 px"):
        ar.encode_prompts([SHORT], 100, 128)
    with pytest.raises(ValueError, match="width is 70 px"):
        ar.encode_prompts([SHORT], 128, 128, torch.rand(1, 3, 64, 70))
    with pytest.raises(ValueError, match=r"sources must be \[2, 3, h, w\]"):
        ar.encode_prompts([SHORT, LONG], 128, 128, torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="non-empty list"):
        ar.encode_prompts([], 128, 128)
    with pytest.raises(ValueError, match="non-empty list"):
        ar.encode_prompts(SHORT, 128, 128)
