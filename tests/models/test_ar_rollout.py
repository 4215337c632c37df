"""The decode loop: against stock greedy decoding, across batches, with adapters, and on bad input."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import GlmImageForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from glm_training.models.glm_image import ar as ar_module
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.decode import write_tokens
from glm_training.models.glm_image.tiny import build_tiny

SHORT, LONG = "a red circle", 'a sign that says "hello" next to a blue square'
SAMPLING = {"temperature": 0.9, "top_p": 0.75}


def sharpen(model, factor=4.0):
    """Random weights so large that positions and prompts matter to the logits, as they do in a trained model."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)


@pytest.fixture(scope="module")
def ar():
    pipeline = build_tiny()
    sharpen(pipeline.vision_language_encoder)
    return ARComponent(pipeline.vision_language_encoder, pipeline.processor)


def uniforms(rows, prompt, seed=0):
    return torch.rand(rows, prompt.T, generator=torch.Generator().manual_seed(seed))


class CodebookOnly(LogitsProcessor):
    def __init__(self, num_codes):
        self.num_codes = num_codes

    def __call__(self, input_ids, scores):
        scores[:, self.num_codes :] = -torch.inf
        return scores


def stock_greedy(ar, prompts, height, width, max_new_tokens=None):
    conversations = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
    inputs = ar.processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "target_h": height, "target_w": width},
    )
    total = sum(rows * columns for rows, columns in ar.grids(height, width, "t2i"))
    sequences = ar.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens or total,
        do_sample=False,
        temperature=None,
        top_p=None,
        logits_processor=LogitsProcessorList([CodebookOnly(ar.num_codes)]),
    )
    return sequences[:, inputs["input_ids"].shape[1] :]


def test_greedy_decoding_writes_what_stock_generate_writes(ar):
    height, width, prompts = 96, 256, [LONG, SHORT]
    prompt = ar.encode_prompts(prompts, height, width)
    rollout = ar.rollout(prompt, 1, uniforms(2, prompt), temperature=1.0, top_p=1.0, do_sample=False)
    expected = stock_greedy(ar, prompts, height, width)
    assert len(expected.unique()) > 5
    assert torch.equal(rollout.tokens, expected)
    assert rollout.large_tokens.shape == (2, height * width // 1024)
    assert torch.equal(rollout.large_tokens, expected[:, prompt.preview_length :])


@pytest.mark.parametrize("sources", [None, torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(ar, sources):
    prompt = ar.encode_prompts([SHORT, LONG], 128, 128, sources)
    draws = uniforms(6, prompt)
    together = ar.rollout(prompt, 3, draws, **SAMPLING)
    assert len(together.tokens.unique(dim=0)) == 6
    for row in (0, 4):
        index = row // 3
        alone = ar.encode_prompts([[SHORT, LONG][index]], 128, 128, None if sources is None else sources[[index]])
        single = ar.rollout(alone, 1, draws[[row]], **SAMPLING)
        assert torch.equal(single.tokens, together.tokens[[row]])
        assert torch.equal(single.support, together.support[[row]])
        torch.testing.assert_close(single.log_probs, together.log_probs[[row]], atol=1e-5, rtol=0)


def test_rows_are_prompt_major_and_can_be_selected(ar):
    prompt = ar.encode_prompts([SHORT, LONG], 64, 64, torch.rand(2, 3, 64, 64))
    rollout = ar.rollout(prompt, 2, uniforms(4, prompt), **SAMPLING)
    assert torch.equal(rollout.prompt.input_ids, prompt.input_ids[[0, 0, 1, 1]])
    assert rollout.tokens.shape == rollout.log_probs.shape == (4, 4)
    assert rollout.tokens.max() < ar.num_codes and rollout.log_probs.dtype == torch.float32
    assert rollout.support.shape == (4, 4, ar.num_codes // 8) and rollout.temperature == 0.9
    picked = rollout.select(torch.tensor([3, 0]))
    assert len(picked) == 2 and torch.equal(picked.tokens, rollout.tokens[[3, 0]])
    assert torch.equal(picked.support, rollout.support[[3, 0]])
    assert torch.equal(picked.prompt.source_tokens, prompt.source_tokens[[1, 0]])
    assert torch.equal(picked.to("cpu").large_tokens, picked.tokens)


def test_what_the_stock_module_caches_neither_matters_nor_changes(ar):
    prompt = ar.encode_prompts([LONG], 64, 64, torch.rand(1, 3, 64, 64))
    draws = uniforms(2, prompt)
    expected = ar.rollout(prompt, 2, draws, **SAMPLING).tokens
    stock_greedy(ar, [SHORT], 32, 256, max_new_tokens=3)
    cached = ar.model.model._cached_decode_position_ids
    assert torch.equal(ar.rollout(prompt, 2, draws, **SAMPLING).tokens, expected)
    assert ar.model.model._cached_decode_position_ids is cached


def test_rotary_that_turns_only_part_of_a_head(ar):
    """GLM-Image rotates half of each head; the tiny model all of it."""
    config = copy.deepcopy(ar.model.config)
    config.text_config.rope_parameters |= {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    model = GlmImageForConditionalGeneration(config).eval()
    model.load_state_dict(ar.model.state_dict())
    assert model.model.language_model.rotary_emb.inv_freq.shape == (8,)
    partial = ARComponent(model, ar.processor)
    prompt = partial.encode_prompts([SHORT, LONG], 64, 64)
    rollout = partial.rollout(prompt, 1, uniforms(2, prompt), **SAMPLING)
    with torch.no_grad():
        replayed = partial(rollout.prompt, rollout.tokens, temperature=0.9, support=rollout.support)
    torch.testing.assert_close(replayed, rollout.log_probs, atol=1e-5, rtol=0)


def test_lora_acts_without_dropout_and_modes_are_restored(ar):
    pipeline = build_tiny()
    pipeline.vision_language_encoder.load_state_dict(ar.model.state_dict())
    lora = ARComponent(pipeline.vision_language_encoder, pipeline.processor)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=list(ARComponent.lora_targets), init_lora_weights=False)
    inject_adapter_in_model(config, lora.model)
    prompt = lora.encode_prompts([SHORT], 96, 96, torch.rand(1, 3, 64, 64))
    draws = uniforms(3, prompt)
    expected = lora.eval().rollout(prompt, 3, draws, **SAMPLING)
    assert not torch.equal(expected.tokens, ar.rollout(prompt, 3, draws, **SAMPLING).tokens)
    lora.train()
    lora.model.model.visual.eval()
    modes = [module.training for module in lora.modules()]
    again = lora.rollout(prompt, 3, draws, **SAMPLING)
    assert torch.equal(again.tokens, expected.tokens)
    assert [module.training for module in lora.modules()] == modes


def test_a_replaced_norm_is_called(ar):
    """Only the stock norm is computed by the loop itself."""

    class Doubled(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            return 2 * self.norm(hidden)

    model = copy.deepcopy(ar.model)
    for layer in model.model.language_model.layers:
        layer.input_layernorm = Doubled(layer.input_layernorm)
    doubled = ARComponent(model, ar.processor)
    prompt = doubled.encode_prompts([SHORT], 64, 64)
    rollout = doubled.rollout(prompt, 2, uniforms(2, prompt), temperature=1.0, top_p=1.0)
    with torch.no_grad():
        torch.testing.assert_close(doubled(rollout.prompt, rollout.tokens), rollout.log_probs, atol=1e-5, rtol=0)
        assert (ar(rollout.prompt, rollout.tokens) - rollout.log_probs).abs().max() > 1e-2


def test_results_can_enter_autograd(ar):
    prompt = ar.encode_prompts([SHORT], 64, 64, torch.rand(1, 3, 64, 64))
    rollout = ar.rollout(prompt, 2, uniforms(2, prompt), **SAMPLING)
    assert not rollout.log_probs.requires_grad
    scale = torch.ones(1, requires_grad=True)
    (scale * rollout.log_probs).sum().backward()
    assert scale.grad.item() == pytest.approx(rollout.log_probs.sum().item())


def test_the_step_hook_sees_every_token_after_the_first_and_can_stop(ar):
    prompt = ar.encode_prompts([SHORT], 64, 64, torch.rand(1, 3, 64, 64))
    steps = []
    ar.train()
    ar.rollout(prompt, 1, uniforms(1, prompt), **SAMPLING, on_step=steps.append)
    assert steps == [1, 2, 3]

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ar.rollout(prompt, 1, uniforms(1, prompt), **SAMPLING, on_step=stop)
    assert ar.model.training
    ar.eval()


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_a_rollout_in_parts_writes_the_same_and_never_more_at_once(ar, monkeypatch, limit):
    prompt = ar.encode_prompts([SHORT, LONG, "x"], 64, 64)
    draws = uniforms(9, prompt)
    together = ar.rollout(prompt, 3, draws, **SAMPLING)
    rows = []

    def counting(model, part, group_size, sampler, *rest):
        rows.append(len(part) * group_size)
        return write_tokens(model, part, group_size, sampler, *rest)

    monkeypatch.setattr(ar_module, "write_tokens", counting)
    parts = ar.rollout(prompt, 3, draws, **SAMPLING, micro_batch_size=limit)
    assert sum(rows) == 9 and max(rows) <= limit
    assert torch.equal(parts.tokens, together.tokens) and torch.equal(parts.support, together.support)
    assert torch.equal(parts.prompt.input_ids, together.prompt.input_ids)
    torch.testing.assert_close(parts.log_probs, together.log_probs, atol=1e-5, rtol=0)


def test_bad_input_is_refused(ar):
    prompt = ar.encode_prompts([SHORT, LONG], 64, 64, torch.rand(2, 3, 64, 64))
    draws = uniforms(4, prompt)
    for wrong in (draws[:3], draws[:, :-1], draws[None]):
        with pytest.raises(ValueError, match=r"uniforms must be \[4, 4\]"):
            ar.rollout(prompt, 2, wrong, **SAMPLING)
    for wrong in (draws + 1, draws - 1, draws * torch.nan):
        with pytest.raises(ValueError, match=r"uniforms must lie in \[0, 1\)"):
            ar.rollout(prompt, 2, wrong, **SAMPLING)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ar.rollout(prompt, 2, draws, temperature=0.0, top_p=1.0)
    for top_p in (0.0, 1.5):
        with pytest.raises(ValueError, match="top_p"):
            ar.rollout(prompt, 2, draws, temperature=1.0, top_p=top_p)
    with pytest.raises(ValueError, match="group_size"):
        ar.rollout(prompt, 0, draws, **SAMPLING)
    with pytest.raises(ValueError, match="micro_batch_size"):
        ar.rollout(prompt, 2, draws, **SAMPLING, micro_batch_size=0)


def test_a_model_that_gives_nan_is_named(ar):
    model = copy.deepcopy(ar.model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    broken = ARComponent(model, ar.processor)
    prompt = broken.encode_prompts([SHORT], 64, 64, torch.rand(1, 3, 64, 64))
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.rollout(prompt, 2, uniforms(2, prompt), **SAMPLING)
