"""The random model of the published widths: its shapes, its ids, and what it is made from."""

from __future__ import annotations

import logging

import pytest
import torch

from glm_training.models.glm_image import full_width, loading
from glm_training.models.glm_image.full_width import SHAPE, full_width_configuration, published, random_network
from glm_training.models.glm_image.prompt_text import PromptReader
from glm_training.models.glm_image.tiny import tiny_ar_tokenizer
from glm_training.models.run_folders import pipeline_in

PARTS = ("vision_language_encoder", "text_encoder", "transformer", "vae")


def shapes(part, configuration):
    with torch.device("meta"):
        network = full_width.build_network(part, configuration)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("part", PARTS)
def test_its_tensors_are_some_of_the_published_ones_shape_by_shape(part):
    few, all_of_them = shapes(part, full_width_configuration(part)), shapes(part, published(part))
    numbers = [sum(torch.Size(shape).numel() for shape in each.values()) for each in (few, all_of_them)]
    assert numbers[0] < numbers[1]
    assert {name: all_of_them.get(name) for name in few} == few


def test_each_network_has_two_layers():
    with torch.device("meta"):
        ar, text, dit, vae = (full_width.build_network(part, full_width_configuration(part)) for part in PARTS)
    counted = [ar.model.language_model.layers, ar.model.visual.blocks, text.encoder.block, dit.transformer_blocks]
    assert [len(layers) for layers in counted] == [2] * 4
    assert {len(block.resnets) for block in vae.decoder.up_blocks} == {2}


def test_its_ids_are_those_of_the_published_vocabulary():
    tokenizer = tiny_ar_tokenizer(SHAPE)
    config = published("vision_language_encoder")
    named = {name: tokenizer.convert_tokens_to_ids(name) for name, _ in SHAPE.marks}
    assert named == dict(SHAPE.marks)
    assert named["<|image|>"] == config["image_token_id"] and tokenizer.pad_token_id == named["<|pad|>"]
    start, end = (tokenizer.convert_tokens_to_ids(f"<|dit_token_{n}|>") for n in (16384, 16385))
    assert [start, end] == [config["image_start_token_id"], config["image_end_token_id"]]
    text = tokenizer("ünïcödé 漢字", add_special_tokens=False).input_ids
    assert config["text_config"]["vision_vocab_size"] <= min(text) and tokenizer.decode(text) == "ünïcödé 漢字"
    assert max(tokenizer.get_vocab().values()) < config["text_config"]["vocab_size"]


def test_weights_depend_on_the_seed_alone_and_buffers_keep_their_type():
    state = torch.random.get_rng_state()
    first, second, other = (
        random_network("text_encoder", full_width_configuration, dtype=torch.bfloat16, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.random.get_rng_state()) and torch.get_default_dtype() == torch.float32
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    small = full_width_configuration("vision_language_encoder")
    text = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 17000}
    small["text_config"] |= text | {"pad_token_id": 0}
    small["vision_config"] |= {"hidden_size": 64, "num_heads": 1, "intermediate_size": 64, "image_size": 256}
    small["vq_config"] |= {"embed_dim": 16, "latent_channels": 64}
    ar = random_network("vision_language_encoder", lambda part: small, dtype=torch.bfloat16)
    rotary = ar.model.language_model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32 and rotary.inv_freq.numel() == 32
    assert {param.dtype for param in ar.parameters()} == {torch.bfloat16}


def test_its_name_needs_no_folder_and_is_asked_of_nobody(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full-width").mkdir()  # a folder of that name is none of it
    assert pipeline_in("full-width") == "full-width"
    loading.check_source("full-width")
    reader = PromptReader.load("full-width")
    assert reader.config.text_config.hidden_size == 4096
    marked, plain = reader.read(["a red <|image|>", "a circle"], 1024, 1024, "t2i")
    assert marked.fault is not None and plain.fault is None
    skeleton = loading.load_skeleton("full-width", "dit")
    assert skeleton.config.num_layers == 2 and next(skeleton.parameters()).is_meta
    made = object()
    monkeypatch.setattr(loading, "build_published", lambda *given, **named: (made, given, named))
    with caplog.at_level(logging.WARNING):
        found, given, named = loading.load_pipeline("full-width", dtype=torch.bfloat16, seed=7)
    assert found is made and given == (full_width_configuration,) and named == {"dtype": torch.bfloat16, "seed": 7}
    assert "random weights" in caplog.text
