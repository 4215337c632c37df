"""The generator's conditions and velocities: what they depend on, on tiny random Qwen2 models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from glm_training.algorithms.flow_tokens import noised
from glm_training.models.loading import ModelLoadError
from glm_training.models.vgt.generator import Generator, GeneratorConfig, RepaConfig, read_config
from glm_training.models.vgt.sequence import random_orders, raster_order
from glm_training.models.vgt.tiny_generator import tiny_generator, tiny_random_generator, tiny_tokenizer
from tests.models.vgt.generators import PROMPTS, lively_generator, named_noise, own_prompt

ORDERS = random_orders(0, "order", [(row,) for row in range(4)], 16)
LATENTS = named_noise("latents", 4, 4, 4, 4)


def by_the_stock_model(generator: Generator, row: int, order: torch.Tensor) -> torch.Tensor:
    """Conditions [L, H] of one row in the order of writing: nothing padded, the stock model's own mask and positions,
    the sequence put together place by place."""
    prompts = own_prompt(generator, row)
    tokens = [generator.llm.embed_tokens(prompts.ids[0])]
    for place in order.tolist():
        y, x = divmod(place, 4)
        embedding = generator.place_embeddings[0, :, 2 + y, 2 + x]  # the middle 4 x 4 of 8 x 8
        tokens += [
            (generator.queries[0, :, 2 + y, 2 + x] + embedding)[None],
            (generator.latent_in(LATENTS[row, :, y, x]) + embedding)[None],
        ]
    hidden = generator.llm(inputs_embeds=torch.cat(tokens)[None], use_cache=False).last_hidden_state[0]
    return generator.condition_out(hidden[prompts.ids.shape[1] :: 2])


@pytest.mark.parametrize("one_order", [True, False])
def test_conditions_are_the_stock_models_without_padding(one_order: bool) -> None:
    generator = tiny_random_generator()
    orders = ORDERS[0] if one_order else ORDERS
    with torch.no_grad():
        conditions = generator.conditions(generator.encode_prompts(PROMPTS), LATENTS, orders)
        for row in range(4):
            order = ORDERS[0 if one_order else row]
            torch.testing.assert_close(
                conditions[row, order], by_the_stock_model(generator, row, order), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("raster", [True, False])
def test_a_query_depends_on_the_latents_written_before_it_and_on_no_other(raster: bool) -> None:
    generator = tiny_random_generator()
    orders = raster_order(16).expand(4, -1) if raster else ORDERS
    latents = LATENTS.clone().requires_grad_()
    conditions = generator.conditions(generator.encode_prompts(PROMPTS), latents, orders)
    ranks = orders.argsort(dim=1)
    for row in range(4):
        for place in range(16):
            (slope,) = torch.autograd.grad(conditions[row, place].sum(), latents, retain_graph=True)
            depends = slope.abs().sum(1).flatten(1) > 0
            expected = torch.zeros(4, 16, dtype=torch.bool)
            expected[row] = ranks[row] < ranks[row, place]
            assert torch.equal(depends, expected)


def test_prompts_tell_rows_apart_and_rows_do_not_meet() -> None:
    generator = lively_generator()
    noisy, times = named_noise("noisy", 4, 16, 4), torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = LATENTS[:1].expand(4, -1, -1, -1)
        velocity = generator(generator.encode_prompts(PROMPTS), same, ORDERS, noisy, times).velocity
        for row in range(4):
            chosen = slice(row, row + 1)
            alone = generator(own_prompt(generator, row), same[:1], ORDERS[chosen], noisy[chosen], times[chosen])
            torch.testing.assert_close(alone.velocity, velocity[chosen], rtol=0, atol=1e-5)
        other = generator(own_prompt(generator, 1), same[:1], ORDERS[:1], noisy[:1], times[:1]).velocity
        assert (other - velocity[:1]).abs().max() > 1e-3


def test_smaller_grids_take_the_middle() -> None:
    generator = tiny_random_generator()
    queries, embeddings = generator.grids((2, 4))
    assert torch.equal(embeddings[0].T.view(32, 2, 4), generator.place_embeddings[0, :, 3:5, 2:6])
    expected = generator.queries[0, :, 3:5, 2:6].flatten(1).T[None] + embeddings
    assert torch.equal(queries, expected)
    assert generator.grids((8, 8))[0].shape == (1, 64, 32)
    with pytest.raises(ValueError, match="must lie within 8 x 8"):
        generator.grids((2, 9))


def test_weights_start_as_published() -> None:
    generator = tiny_random_generator(query_grid=64)
    assert generator.queries.std().item() == pytest.approx(32**-0.5, rel=0.01)
    assert generator.place_embeddings.std().item() == pytest.approx(0.02, rel=0.01)
    assert generator.condition_out.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert generator.latent_in.bias.abs().max() == 0
    state = torch.random.get_rng_state()
    first, same, other = (tiny_random_generator(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["queries"], other["queries"])


@pytest.mark.parametrize("tied", [True, False])
def test_all_learns_but_embeddings_tied_to_an_output_layer(tied: bool) -> None:
    llm = tiny_random_generator().config.llm | {"tie_word_embeddings": tied}
    generator = lively_generator(llm=llm, repa=RepaConfig(features=6, hidden=8))
    times = torch.full((4, 16), 0.5)
    noisy, target = noised(LATENTS.flatten(2).transpose(1, 2), named_noise("noise", 4, 16, 4), times)
    prediction = generator(generator.encode_prompts(PROMPTS), LATENTS, ORDERS[0], noisy, times)
    assert prediction.features.shape == (4, 16, 6)
    ((prediction.velocity - target).square().mean() + prediction.features.square().mean()).backward()
    still = {name for name, param in generator.named_parameters() if param.grad is None or param.grad.abs().max() == 0}
    # a bias of the keys moves every score of a query alike
    keys = {name for name, _ in generator.named_parameters() if name.endswith("k_proj.bias")}
    frozen = {name for name, param in generator.named_parameters() if not param.requires_grad}
    assert still - keys == frozen == ({"llm.embed_tokens.weight"} if tied else set())
    assert not any("lm_head" in name for name in generator.state_dict())
    assert generator.queries.grad[..., 2:6, 2:6].abs().min() > 0


def test_checkpointing_and_autocast_leave_the_velocity_as_it_is() -> None:
    generator = lively_generator()
    given = (LATENTS, ORDERS[0], named_noise("noisy", 4, 16, 4), torch.full((4, 16), 0.3))
    prompts = generator.encode_prompts(PROMPTS)

    def slopes() -> list[torch.Tensor]:
        generator.zero_grad()
        generator(prompts, *given).velocity.square().mean().backward()
        return [param.grad.clone() for param in generator.parameters() if param.grad is not None]

    plain = slopes()
    generator.enable_gradient_checkpointing()
    generator.train()
    torch.testing.assert_close(slopes(), plain)
    generator.eval()
    with torch.no_grad():
        exact = generator(prompts, *given).velocity
        with torch.autocast("cpu", torch.bfloat16):
            rough = generator(prompts, *given).velocity
        half = generator.cast(torch.bfloat16)(prompts, *given).velocity
    scale = exact.abs().max().item()
    for other in (rough, half):  # bf16 keeps 8 bits, over a dozen layers
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, exact, rtol=0, atol=0.1 * scale)


def test_a_folder_loads_again(tmp_path) -> None:
    generator = lively_generator(repa=RepaConfig(features=6, hidden=8), latent_norm=False)
    generator.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer"}
    state = torch.random.get_rng_state()
    loaded = Generator.from_pretrained(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    saved, read = generator.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    assert (loaded.config.grid, loaded.config.latent_norm, loaded.config.repa) == ((4, 4), False, RepaConfig(6, 8))
    assert not loaded.training and not loaded.llm.embed_tokens.weight.requires_grad
    texts = [*PROMPTS, "ünïcödé 漢字 50 % <img>"]
    assert torch.equal(loaded.encode_prompts(texts).ids, generator.encode_prompts(texts).ids)
    with torch.no_grad():
        conditions = [made.conditions(made.encode_prompts(PROMPTS), LATENTS, ORDERS) for made in (generator, loaded)]
    assert torch.equal(*conditions)
    half = Generator.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.queries, generator.queries.to(torch.bfloat16))
    assert {param.dtype for param in half.parameters()} == {torch.bfloat16}
    frequencies = 1e4 ** -(torch.arange(8) / 8)  # of heads of 16
    torch.testing.assert_close(half.llm.rotary_emb.inv_freq, frequencies, rtol=1e-6, atol=0)


def test_takes_a_pretrained_language_model() -> None:
    made = tiny_random_generator()
    llm = Qwen2ForCausalLM(made.llm.config).model
    generator = Generator(made.config, made.tokenizer, llm)
    assert generator.llm is llm and not llm.embed_tokens.weight.requires_grad


def test_refuses_folders_that_are_no_generator(tmp_path) -> None:
    with pytest.raises(ModelLoadError, match="no VGT generator in .* no config.json"):
        Generator.from_pretrained(tmp_path)
    tiny_random_generator().save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())

    def refusal(**changes: object) -> str:
        kept = {name: value for name, value in (config | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        with pytest.raises(ModelLoadError) as caught:
            Generator.from_pretrained(tmp_path)
        return str(caught.value)

    assert "differ, first head.latent_in.weight" in refusal(latent_channels=8)
    assert "grid is missing; latent_norm is missing; latent_chanels is no key" in refusal(
        grid=..., latent_norm=..., latent_chanels=8
    )
    assert "must be a qwen2, got a llama; head_width must be at least 1" in refusal(
        llm={"model_type": "llama"}, head_width=0
    )
    assert 'config.json is not of a VGT generator: it has no "model_type"' in refusal(model_type="vgt_autoencoder")
    assert "unexpected keyword argument 'feature'" in refusal(repa={"feature": 3})
    save_file({name: tensor for name, tensor in weights.items() if name != "queries"}, tmp_path / "model.safetensors")
    assert "do not fit the Generator: 1 of" in refusal()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="config.json is no JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(ModelLoadError, match="has no folder tokenizer"):
        Generator.from_pretrained(tmp_path)


def test_the_autoencoder_must_be_its_own() -> None:
    config = tiny_random_generator().config
    config.check_autoencoder(4, True, 8)
    with pytest.raises(ValueError, match="latents have 8 channels and the generator draws 4"):
        config.check_autoencoder(8, True, 8)
    with pytest.raises(ValueError, match="does not norm its latents .* draws them normed"):
        config.check_autoencoder(4, False, 8)


LLM = tiny_random_generator().config.llm


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llm": LLM | {"use_sliding_window": True}}, "use_sliding_window"),
        ({"latent_channels": 0}, "latent_channels must be at least 1"),
        ({"head_depth": 0}, "head_depth must be at least 1"),
        ({"grid": (65, 2)}, "must lie within 64 x 64"),
    ],
)
def test_refuses_configurations(changes, named: str) -> None:
    values = {"llm": LLM, "latent_channels": 4, "latent_norm": True, "grid": (4, 4)} | changes
    with pytest.raises(ValueError, match=named):
        GeneratorConfig(**values)


def test_refuses_shapes_and_a_tokenizer_that_is_too_large() -> None:
    generator = tiny_random_generator()
    prompts, noisy, times = generator.encode_prompts(PROMPTS[:2]), torch.zeros(2, 16, 4), torch.zeros(2, 16)
    for latents, named in ((torch.zeros(2, 8, 4, 4), "with the channels"), (torch.zeros(3, 4, 4, 4), "one per prompt")):
        with pytest.raises(ValueError, match=named):
            generator(prompts, latents, ORDERS[0], noisy, times)
    with pytest.raises(ValueError, match=r"noisy must be \[2, 16, 4\]"):
        generator(prompts, torch.zeros(2, 4, 4, 4), ORDERS[0], noisy[:, :9], times)
    with pytest.raises(ValueError, match=r"order must be \[16\]"):
        generator(prompts, torch.zeros(2, 4, 4, 4), ORDERS[0, :9], noisy, times)
    small = generator.config.llm | {"vocab_size": 100, "pad_token_id": None}
    with pytest.raises(ValueError, match="the language model 100"):
        tiny_random_generator(llm=small)


def test_the_trainable_tiny_one_is_small_and_knows_its_words() -> None:
    corpus = ["a red circle left of a blue square"] * 4
    generator = tiny_generator(8, True, (8, 6), corpus=corpus)
    assert 1e6 < sum(param.numel() for param in generator.parameters()) < 3e6
    assert generator.grids((8, 6))[0].shape == (1, 48, 128)
    plain = tiny_tokenizer()
    assert len(generator.tokenizer(corpus[0]).input_ids) < len(plain(corpus[0]).input_ids) / 2
    assert generator.tokenizer.decode(generator.tokenizer(corpus[0]).input_ids) == corpus[0]
