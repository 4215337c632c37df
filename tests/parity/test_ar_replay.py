"""Replaying a rollout through the atomic unit gives the log-probs it was drawn with; the stock forward does not."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from glm_training.models.glm_image import ar as ar_module
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import build_tiny

PROMPTS = ["a red circle", 'a sign that says "hello" next to a blue square']
TOLERANCE = 1e-5


@pytest.fixture
def ar():
    """Random weights so large that positions and prompts matter to the logits, as they do in a trained model."""
    pipeline = build_tiny()
    with torch.no_grad():
        for weight in pipeline.vision_language_encoder.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return ARComponent(pipeline.vision_language_encoder, pipeline.processor)


def encode(ar, mode, count=2, height=64, width=96):
    generator = torch.Generator().manual_seed(7)
    sources = torch.rand(count, 3, 96, 64, generator=generator) if mode == "i2i" else None
    return ar.encode_prompts(PROMPTS[:count], height, width, sources)


def draw(ar, prompt, group=2, *, top_p=1.0, temperature=0.9):
    uniforms = torch.rand(len(prompt) * group, prompt.T, generator=torch.Generator().manual_seed(0))
    return ar.rollout(prompt, group, uniforms, temperature=temperature, top_p=top_p)


def replay(ar, rollout):
    return ar(rollout.prompt, rollout.tokens, temperature=rollout.temperature, support=rollout.support)


def gradients(ar, rollout):
    """Of a sum in which every token has a weight of its own."""
    ar.zero_grad()
    log_probs = replay(ar, rollout)
    weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    (weights * log_probs).sum().backward()
    named = {name: weight.grad for name, weight in ar.named_parameters() if weight.grad is not None}
    return log_probs.detach(), {name: grad.clone() for name, grad in named.items()}


def assert_same_gradients(first, second):
    assert first.keys() == second.keys() and len(first) > 5
    for name, grad in first.items():
        torch.testing.assert_close(grad, second[name], atol=1e-5 * float(grad.abs().max()), rtol=1e-4, msg=name)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.75])
@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_replay_equals_the_rollout(ar, mode, top_p, count):
    prompt = encode(ar, mode, count)
    assert prompt.padded == (count == 2)
    rollout = draw(ar, prompt, top_p=top_p)
    log_probs = replay(ar, rollout)
    assert log_probs.requires_grad and log_probs.dtype == torch.float32
    assert (log_probs - rollout.log_probs).abs().max() <= TOLERANCE
    picked = torch.tensor([len(rollout) - 1, 0])
    assert (replay(ar, rollout.select(picked)) - rollout.log_probs[picked]).abs().max() <= TOLERANCE


def test_the_stock_forward_scores_other_positions(ar):
    """The trap: teacher forcing through the stock model gives the written tokens the positions of text."""
    prompt = encode(ar, "t2i", count=1)
    rollout = draw(ar, prompt, group=2)
    ids = torch.cat([rollout.prompt.input_ids, rollout.tokens[:, :-1]], dim=1)
    stored_grids = torch.tensor([[1, *grid] for grid in reversed(prompt.grids)]).repeat(2, 1)
    with torch.no_grad():
        logits = ar.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            image_grid_thw=stored_grids,
            images_per_sample=torch.tensor([2, 2]),
        ).logits[:, prompt.input_ids.shape[1] - 1 :, : ar.num_codes]
    stock = (logits / 0.9).log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
    assert (stock[:, 0] - rollout.log_probs[:, 0]).abs().max() <= TOLERANCE  # the prompt alone is placed right
    assert (stock - rollout.log_probs).abs().max() > 0.1


def test_the_support_and_temperature_of_the_rollout_are_needed(ar):
    rollout = draw(ar, encode(ar, "i2i"), top_p=0.75)
    with torch.no_grad():
        whole = ar(rollout.prompt, rollout.tokens, temperature=0.9)
        colder = ar(rollout.prompt, rollout.tokens, temperature=0.8, support=rollout.support)
    assert (whole - rollout.log_probs).mean() < -0.1  # less probable among all codes than among the kept ones
    assert (colder - rollout.log_probs).abs().max() > 1e-2


def test_a_changed_policy_gives_another_ratio(ar):
    rollout = draw(ar, encode(ar, "t2i"), top_p=0.75)
    with torch.no_grad():
        ar.model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(1.05)
        ratio = (replay(ar, rollout) - rollout.log_probs).exp()
    assert ((ratio - 1).abs() > 1e-3).float().mean() > 0.5


def test_padding_and_batch_do_not_change_a_score(ar):
    rollout = draw(ar, encode(ar, "i2i"), group=1)
    source = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(7))[:1]
    alone = ar.encode_prompts(PROMPTS[:1], 64, 96, source)
    assert alone.input_ids.shape[1] < rollout.prompt.input_ids.shape[1]
    with torch.no_grad():
        single = ar(alone, rollout.tokens[:1], temperature=0.9)
    assert (single - rollout.log_probs[:1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing_changes_no_gradient(ar, adapted):
    if adapted:
        targets = list(ARComponent.lora_targets)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), ar.model)
    ar.train()
    rollout = draw(ar, encode(ar, "t2i"), group=1, top_p=0.75)
    plain_log_probs, plain = gradients(ar, rollout)
    assert any("lora_" in name for name in plain) == adapted
    calls = []
    layer = ar.model.model.language_model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    ar.enable_gradient_checkpointing()
    log_probs, recomputed = gradients(ar, rollout)
    assert len(calls) == 2  # once forward, once again for the backward
    assert torch.equal(log_probs, plain_log_probs)
    assert_same_gradients(plain, recomputed)
    assert (log_probs - rollout.log_probs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("top_p", [1.0, 0.75])
def test_scoring_in_chunks_changes_nothing(ar, monkeypatch, top_p):
    rollout = draw(ar, encode(ar, "t2i"), group=1, top_p=top_p)
    whole_log_probs, whole = gradients(ar, rollout)
    largest = []
    ar.model.lm_head.register_forward_hook(lambda _, __, logits: largest.append(logits.numel()))
    monkeypatch.setattr(ar_module, "LOGITS_PER_CHUNK", 2 * 96 * 50)  # 50 tokens of two rows
    log_probs, chunked = gradients(ar, rollout)
    assert max(largest) <= 2 * 96 * 50
    assert len(largest) == 2 * -(-rollout.prompt.T // 50)  # each chunk again in the backward
    torch.testing.assert_close(log_probs, whole_log_probs, atol=1e-5, rtol=0)
    assert_same_gradients(whole, chunked)
    with torch.no_grad():
        torch.testing.assert_close(replay(ar, rollout), whole_log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_lora_replay_equals_the_rollout(ar, mode):
    targets = list(ARComponent.lora_targets)
    base = draw(ar, encode(ar, mode), top_p=0.75)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), ar.model)
    rollout = draw(ar, encode(ar, mode), top_p=0.75)
    assert not torch.equal(rollout.tokens, base.tokens)
    assert (replay(ar, rollout) - rollout.log_probs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_under_autocast_rollout_and_replay_stay_close(ar, mode):
    """bf16 rounds differently for one token and for all of them at once: close, not equal."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = draw(ar, encode(ar, mode), top_p=0.75)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # one of its own: torch 2.8 keeps what it cast for the rollout
        log_probs = replay(ar, rollout)
    assert log_probs.dtype == torch.float32
    assert (log_probs - rollout.log_probs).abs().mean() < 0.15
    exact = draw(ar, encode(ar, mode), top_p=0.75)
    assert not torch.equal(exact.log_probs, rollout.log_probs)  # autocast did act


def test_a_bf16_model_samples_and_scores(ar):
    ar.to(torch.bfloat16)
    rollout = draw(ar, encode(ar, "t2i"), top_p=0.75)
    log_probs = replay(ar, rollout)
    assert log_probs.dtype == rollout.log_probs.dtype == torch.float32
    assert (log_probs - rollout.log_probs).abs().mean() < 0.15


def test_mismatched_replays_are_refused(ar):
    rollout = draw(ar, encode(ar, "i2i"), top_p=0.75)
    with pytest.raises(ValueError, match=r"tokens must be \[4, 6\]"):
        ar(rollout.prompt, rollout.tokens[:, :-1])
    with pytest.raises(ValueError, match=r"tokens must be \[2, 6\]"):
        ar(rollout.prompt.select(torch.tensor([0, 1])), rollout.tokens)
    with pytest.raises(ValueError, match=r"support must be uint8 \[4, 6, 8\]"):
        ar(rollout.prompt, rollout.tokens, support=rollout.support[:, :, :-1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        ar(rollout.prompt, rollout.tokens, temperature=0.0)
