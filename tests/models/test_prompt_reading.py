"""How much of a prompt a model reads, told by tokenizers alone and borne out by what the encoders then give."""

from __future__ import annotations

import json

import pytest
import torch

from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.glyph import MAX_GLYPH_TOKENS, _at_once, encode_spans
from glm_training.models.glm_image.prompt_text import PromptReader as GLMReader
from glm_training.models.glm_image.tiny import build_tiny as build_glm
from glm_training.models.loading import ModelLoadError
from glm_training.models.prompt_reading import MAX_CHARACTERS, read_by_encoders
from glm_training.models.sdxl.text import PromptReader as SDXLReader
from glm_training.models.sdxl.text import encode_prompts
from glm_training.models.sdxl.tiny import build_tiny as build_sdxl

ROOM = 8192 - (16 * 16 + 2 * 2) - 32
"""Context of the tiny AR half without the tokens of a 64 x 64 px image (preview and large grid) and the template."""


@pytest.fixture(scope="module")
def sdxl():
    return build_sdxl()


@pytest.fixture(scope="module")
def glm():
    return build_glm()


def read_sdxl(*prompts: str):
    return SDXLReader.load("tiny-random").read(prompts, 64, 64, "t2i")


def read_glm(prompt: str, mode: str = "t2i"):
    (reading,) = GLMReader.load("tiny-random").read([prompt], 64, 64, mode)
    return reading


# -- SDXL --------------------------------------------------------------------------------------------------------------


def test_sdxl_reads_75_words_between_two_marks():
    whole, cut = read_sdxl(" ".join(["red"] * 75), " ".join(["red"] * 74 + ["blue", "red"]))
    assert whole.cut is None and whole.fault is None and whole.read is None
    assert cut.cut == "78 tokens, of which 77 are read, up to '...red red red red red red red red red blue'"
    assert cut.fault is None


def test_prompts_that_read_the_same_have_one_embedding(sdxl):
    start = " ".join(["red"] * 74)
    prompts = [f"{start} blue cat", f"{start} blue sign", f"{start} green cat"]
    readings = read_sdxl(*prompts)
    tokenizers, encoders = (sdxl.tokenizer, sdxl.tokenizer_2), (sdxl.text_encoder, sdxl.text_encoder_2)
    # alone: rows of one pass that hold the same may differ in their last bits
    embeds = [encode_prompts([prompt], tokenizers, encoders).prompt_embeds for prompt in prompts]
    for one, other, same in ((0, 1, True), (0, 2, False), (1, 2, False)):
        assert (readings[one].read == readings[other].read) is same
        assert torch.equal(embeds[one], embeds[other]) is same


def test_the_shorter_tokenizer_tells_where_reading_stops():
    first, second = SDXLReader.load("tiny-random").tokenizers
    second.model_max_length = 5
    (reading,) = read_by_encoders(["a red circle left of the sign"], (first, second))
    assert reading.cut == "9 tokens, of which 5 are read, up to 'a red circle'"


# -- GLM-Image ---------------------------------------------------------------------------------------------------------


def test_an_image_that_fills_the_context_is_what_is_too_large():
    reader = GLMReader.load("tiny-random")
    (reason, remedy), again = (reading.fault for reading in reader.read(["a cat", "a dog"], 8192, 8192, "t2i"))
    assert reason == "an image of 8192 x 8192 px fills the AR half's context and leaves no room for a prompt"
    assert remedy == "Take a smaller image size" and again == (reason, remedy)


@pytest.mark.parametrize(("mode", "room"), [("t2i", ROOM), ("i2i", 8192 - 2 * 2 * 2 - 32)])
def test_glm_takes_what_its_context_holds_beside_the_images(mode, room):
    assert read_glm("x" * room, mode).fault is None  # a byte is a token here
    reason, remedy = read_glm("x" * (room + 1), mode).fault
    assert f"has {room + 1} tokens, and the AR half has room for {room} " in reason and "Shorten" in remedy


def test_the_template_needs_no_more_than_is_kept_for_it(glm):
    component = ARComponent(glm.vision_language_encoder, glm.processor)
    for size in (64, 2016):
        assert component.encode_prompts(["x"], size, size).input_ids.shape[1] - 1 <= 32
    source = component.encode_prompts(["x"], 64, 64, torch.zeros(1, 3, 64, 64))
    assert source.input_ids.shape[1] - 1 - 2 * 2 <= 32


def test_the_model_itself_refuses_what_the_reading_refuses(glm):
    component = ARComponent(glm.vision_language_encoder, glm.processor)
    with pytest.raises(ValueError, match=r"prompt 1 \('xxx.*\.\.\.'\): the prompt has 8000 tokens"):
        component.encode_prompts(["x", "x" * 8000], 64, 64)
    with pytest.raises(ValueError, match="quoted texts come to over 8192"):
        encode_spans(["y" * 2000] * 5, glm.text_encoder, glm.tokenizer, torch.device("cpu"))


def test_glm_cuts_long_quotes_and_says_so():
    assert read_glm(f'"{"y" * 2047}"').cut is None
    told = read_glm(f'a sign "{"y" * 2046}ä"').cut  # in UTF-8 one byte too many, in the middle of the last letter
    assert told == f"a quoted text of 2048 bytes, of which 2047 are drawn, up to '...{'y' * 40}'"
    reader = GLMReader.load("tiny-random")
    reader.config.text_config.max_position_embeddings = 20_000
    pages = " ".join(['"' + "y" * 2000 + '"'] * 3 + ['"' + "z" * 1800 + '"'] + ["'a'"] * 130)
    reason, _ = reader.read([pages], 64, 64, "t2i")[0].fault
    assert reason.startswith("134 quoted texts come to over 8192 bytes")


def test_reserved_tokens_are_a_fault():
    reason, remedy = read_glm("a cat <|image|>").fault
    assert "reserved token <|image|>" in reason and remedy == "Take it out"


@pytest.mark.parametrize("read", [lambda text: read_sdxl(text)[0], read_glm])
def test_a_book_is_not_tokenized(read):
    reason, _ = read("a" * (MAX_CHARACTERS + 1)).fault
    assert "100001 characters" in reason


def test_many_spans_are_encoded_in_batches_that_stay_small(glm):
    spans = ["y" * 1500, *[f"{i:03}" for i in range(300)], "z" * 1500]
    rows = [[0] * (len(span) + 2) for span in spans]
    batches = _at_once(rows)
    assert sum(batches, []) == rows and len(batches) > 1
    assert all(len(batch) * max(map(len, batch)) <= MAX_GLYPH_TOKENS for batch in batches)
    spans = ["long one" * 20, "ab", "cd"] * 17
    device = torch.device("cpu")
    together = encode_spans(spans, glm.text_encoder, glm.tokenizer, device)
    alone = torch.cat([encode_spans([span], glm.text_encoder, glm.tokenizer, device) for span in spans])
    # fp32 with other padding: T5's activations are of order 1 after its last norm
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# -- files -------------------------------------------------------------------------------------------------------------


def test_readers_come_from_folders_and_only_from_there(glm, sdxl, tmp_path):
    glm.processor.save_pretrained(tmp_path / "glm/processor")
    assert GLMReader.load(str(tmp_path / "glm")) is None and GLMReader.load("nobody/nothing") is None
    glm.vision_language_encoder.config.save_pretrained(tmp_path / "glm/vision_language_encoder")
    (reading,) = GLMReader.load(str(tmp_path / "glm")).read(["x" * (ROOM + 1)], 64, 64, "t2i")
    assert f"room for {ROOM}" in reading.fault[0]
    for part in ("tokenizer", "tokenizer_2"):
        getattr(sdxl, part).save_pretrained(tmp_path / "sdxl" / part)
    (reading,) = SDXLReader.load(str(tmp_path / "sdxl")).read([" ".join(["red"] * 76)], 64, 64, "t2i")
    assert reading.cut.startswith("78 tokens, of which 77")
    (tmp_path / "glm/vision_language_encoder/config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer in"):
        GLMReader.load(str(tmp_path / "glm"))
