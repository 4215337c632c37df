"""Glyph embeddings: the stock's ways for one prompt, masks instead of attended padding for several, and the cache."""

import pytest
import torch

from glm_training.models.glm_image.glyph import GlyphCache, glyph_texts
from glm_training.models.glm_image.tiny import build_tiny

PROMPTS = [
    "nothing quoted",
    'one "span"',
    'two "a" and "longer one"',
    "it's Tom's and Ann's 'sign'",
    "“curly” and 「角」 and \"x\" and 'y'",
    'empty "" quotes',
]


@pytest.fixture(scope="module")
def pipe():
    return build_tiny()


def stock_embedding(pipe, prompt: str, **options) -> torch.Tensor:
    with torch.no_grad():
        return pipe._get_glyph_embeds(prompt, **options)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_equals_stock(pipe, prompt):
    expected = stock_embedding(pipe, prompt)
    glyph, mask = GlyphCache().embed([prompt], pipe.text_encoder, pipe.tokenizer)
    assert torch.equal(glyph, expected) and mask.all()
    assert list(glyph_texts(prompt)) == (pipe.get_glyph_texts(prompt)[0] or [""])


def test_long_spans_are_cut_like_the_stocks(pipe, monkeypatch):
    monkeypatch.setattr("glm_training.models.glm_image.glyph.MAX_SPAN_TOKENS", 6)
    prompt = 'signs "abcdefghij" and "ab"'
    expected = stock_embedding(pipe, prompt, max_sequence_length=6)
    glyph, _ = GlyphCache().embed([prompt], pipe.text_encoder, pipe.tokenizer)
    assert torch.equal(glyph, expected) and glyph.shape[1] == 7 + 4


def test_quirks_are_kept(pipe):
    assert glyph_texts("it's Tom's") == ("s Tom",)  # apostrophes open a span
    assert glyph_texts("none") == ("",)
    one, _ = GlyphCache().embed(['"ab"'], pipe.text_encoder, pipe.tokenizer)
    two, _ = GlyphCache().embed(['"ab" "cd"'], pipe.text_encoder, pipe.tokenizer)
    assert one.shape[1] == 3 and two.shape[1] == 8  # an even number of spans: one attended pad before each


def test_batch_is_right_padded_with_a_mask(pipe):
    glyph, mask = GlyphCache().embed(PROMPTS[:3], pipe.text_encoder, pipe.tokenizer)
    expected = [stock_embedding(pipe, prompt)[0] for prompt in PROMPTS[:3]]
    lengths = [len(row) for row in expected]
    assert mask.sum(1).tolist() == lengths and glyph.shape[1] == max(lengths)
    for row in range(3):
        assert torch.equal(glyph[row, : lengths[row]], expected[row])
        assert not mask[row, lengths[row] :].any() and not glyph[row, lengths[row] :].any()


def test_cache_encodes_once_and_is_bounded(pipe):
    calls = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    cache = GlyphCache(capacity=2)
    first, _ = cache.embed(['"a"', '"b"', 'other words "a"'], pipe.text_encoder, pipe.tokenizer)
    assert len(calls) == 2 and len(cache) == 2 and torch.equal(first[0], first[2])
    cache.embed(['"a"', '"c"'], pipe.text_encoder, pipe.tokenizer)  # "b" was used longest ago
    assert len(calls) == 3 and len(cache) == 2
    cache.embed(['"a"'], pipe.text_encoder, pipe.tokenizer)
    assert len(calls) == 3
    cache.embed(['"b"'], pipe.text_encoder, pipe.tokenizer)
    handle.remove()
    assert len(calls) == 4


def test_cache_forgets_when_the_encoder_changes_dtype_or_is_replaced():
    pipe, other = build_tiny(), build_tiny(seed=1)
    cache = GlyphCache()
    before, _ = cache.embed(['"a"'], pipe.text_encoder, pipe.tokenizer)
    replaced, _ = cache.embed(['"a"'], other.text_encoder, other.tokenizer)
    assert not torch.equal(before, replaced)
    pipe.text_encoder.to(torch.bfloat16)
    after, _ = cache.embed(['"a"'], pipe.text_encoder, pipe.tokenizer)
    assert after.dtype == torch.bfloat16 and len(cache) == 1


def test_embedding_does_not_depend_on_who_asks_first(pipe):
    plain, _ = GlyphCache().embed(['"a"'], pipe.text_encoder, pipe.tokenizer)
    cache = GlyphCache()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cache.embed(['"a"'], pipe.text_encoder, pipe.tokenizer)
    cached, _ = cache.embed(['"a"'], pipe.text_encoder, pipe.tokenizer)
    assert torch.equal(cached, plain) and not cached.is_inference()
    weight = torch.nn.Linear(32, 1)
    weight(cached).sum().backward()  # an inference tensor could not be saved for this


def test_embeddings_stand_where_they_are_asked_for_and_who_makes_them_is_asked_once(pipe):
    """The meta device stands for one that the sleeping text encoder is not on."""
    cache, asked = GlyphCache(), []
    own, _ = cache.embed(['one "span"'], pipe.text_encoder, pipe.tokenizer)
    assert own.device.type == "cpu"
    cache.made = lambda spans: asked.append(spans) or torch.ones(3, own.shape[-1])
    for _ in range(2):
        glyph, mask = cache.embed(['one "span"', 'its "span"'], pipe.text_encoder, pipe.tokenizer, torch.device("meta"))
        assert (glyph.device.type, mask.device.type, glyph.shape[:2]) == ("meta", "meta", (2, 3))
    assert asked == [("span",)]
    assert torch.equal(
        cache.embed(['"span"'], pipe.text_encoder, pipe.tokenizer)[0], torch.ones_like(glyph[:1], device="cpu")
    )
