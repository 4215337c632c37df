"""The AR half's objectives on a real rollout: CISPO, entropy bonus, weights of the grids, Dr.GRPO."""

from __future__ import annotations

import pytest
import torch

from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import build_tiny

ADVANTAGES = torch.tensor([1.0, -0.5, 2.0])


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=["all codes", "nucleus"])
def drawn(request):
    """A component with a rollout that it drew before its head was moved."""
    pipe = build_tiny()
    ar = ARComponent(pipe.vision_language_encoder, pipe.processor)
    prompt = ar.encode_prompts(["a red circle"], 64, 64)
    uniforms = torch.rand(3, prompt.T, generator=torch.Generator().manual_seed(0))
    rollout = ar.rollout(prompt, 3, uniforms, temperature=0.8, top_p=request.param)
    with torch.no_grad():
        head = ar.model.lm_head.weight
        head.add_(0.3 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    return ar, rollout


def loss_of(method: ARPolicyGradient, ar, rollout):
    (term,) = method.losses(ar, rollout, ADVANTAGES)
    return term


def replayed(ar, rollout) -> torch.Tensor:
    return ar(rollout.prompt, rollout.tokens, temperature=rollout.temperature, support=rollout.support)


def test_cispo_weighs_log_probs_by_the_capped_ratio(drawn):
    ar, rollout = drawn
    log_probs = replayed(ar, rollout)
    ratio = (log_probs - rollout.log_probs).exp().detach()
    cap = float(ratio.median().clamp(min=1.0))
    term = loss_of(ARPolicyGradient((0.0, cap), 0.0, objective="cispo"), ar, rollout)
    wanted = -(ratio.clamp(max=cap) * ADVANTAGES[:, None] * log_probs).mean()
    torch.testing.assert_close(term.loss, wanted)
    weight = ar.model.lm_head.weight
    torch.testing.assert_close(torch.autograd.grad(term.loss, weight)[0], torch.autograd.grad(wanted, weight)[0])


def test_the_entropy_bonus_is_that_of_the_sampled_distribution(drawn):
    ar, rollout = drawn
    plain = loss_of(ARPolicyGradient((0.2, 0.2), 0.0), ar, rollout)
    bonus = loss_of(ARPolicyGradient((0.2, 0.2), 0.0, entropy_coef=0.01), ar, rollout)
    # by brute force: the probability of every code that the support holds
    codes = torch.arange(ar.num_codes)
    total = torch.zeros(())
    for code in codes:
        tokens = torch.full_like(rollout.tokens, int(code))
        tokens[:, :-1] = rollout.tokens[:, :-1]  # only the last token's distribution has the same history
        log_prob = ar(rollout.prompt, tokens, temperature=rollout.temperature, support=rollout.support)[:, -1]
        total = total - torch.where(log_prob > -1e9, log_prob.exp() * log_prob.clamp(min=-1e9), 0.0).sum()
    scored = ar(rollout.prompt, rollout.tokens, temperature=rollout.temperature, support=rollout.support, entropy=True)
    torch.testing.assert_close(scored[0], replayed(ar, rollout))
    torch.testing.assert_close(scored[1][:, -1].sum(), total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bonus.loss, plain.loss - 0.01 * scored[1].mean())
    gradient = torch.autograd.grad(bonus.loss, ar.model.lm_head.weight)[0]
    assert gradient.isfinite().all()


def test_preview_and_large_tokens_have_weights_of_their_own(drawn):
    ar, rollout = drawn
    preview = rollout.prompt.preview_length
    ratio = (replayed(ar, rollout) - rollout.log_probs).exp()
    terms = -torch.minimum(ratio * ADVANTAGES[:, None], ratio.clamp(0.8, 1.2) * ADVANTAGES[:, None])
    weights = torch.cat([torch.full((preview,), 3.0), torch.full((rollout.prompt.T - preview,), 0.5)])
    method = ARPolicyGradient((0.2, 0.2), 0.0, preview_weight=3.0, large_weight=0.5)
    assert 0 < preview < rollout.prompt.T
    torch.testing.assert_close(loss_of(method, ar, rollout).loss, (terms * weights).sum() / weights.sum() / 3)


def test_advantage_and_kl_of_each_token_have_weights_of_their_own(drawn):
    ar, rollout = drawn
    log_probs = replayed(ar, rollout)
    weights = torch.rand(3, 2, rollout.prompt.T, generator=torch.Generator().manual_seed(5)) + 0.5
    anchor = log_probs.detach() + 0.3
    method = ARPolicyGradient((0.2, 0.2), 0.5, similarity_weighting=True)
    (term,) = method.losses(ar, rollout, ADVANTAGES, anchor, token_weights=weights)
    ratio, advantages = (log_probs - rollout.log_probs).exp(), ADVANTAGES[:, None] * weights[:, 0]
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = 0.5 * weights[:, 1] * ((anchor - log_probs).exp() - 0.3 - 1)
    torch.testing.assert_close(term.loss, (terms + kl).mean())
    with pytest.raises(ValueError, match="token_weights are needed"):
        next(method.losses(ar, rollout, ADVANTAGES, anchor))


def test_dr_grpo_divides_by_the_tokens_of_an_image(drawn):
    ar, rollout = drawn
    method = ARPolicyGradient((0.2, 0.2), 0.0, aggregation="constant", preview_weight=2.0)
    ratio = (replayed(ar, rollout) - rollout.log_probs).exp()
    terms = -torch.minimum(ratio * ADVANTAGES[:, None], ratio.clamp(0.8, 1.2) * ADVANTAGES[:, None])
    weights = torch.ones(rollout.prompt.T)
    weights[: rollout.prompt.preview_length] = 2.0
    torch.testing.assert_close(loss_of(method, ar, rollout).loss, (terms * weights).sum() / (3 * rollout.prompt.T))
