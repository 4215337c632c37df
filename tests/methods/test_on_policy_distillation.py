"""The KL to a teacher, of tokens by brute force over the codes and of denoising steps by hand."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from glm_training.methods.on_policy_distillation import step_terms, token_terms
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import build_tiny
from tests.methods.test_policy_gradients import NEW, REFERENCE, drawn, mean_and_std
from tests.methods.toys import ToyVelocity


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=["all codes", "nucleus"])
def plans(request):
    """A component, a rollout that it drew, and a context in which its head is the teacher's."""
    pipe = build_tiny()
    ar = ARComponent(pipe.vision_language_encoder, pipe.processor)
    prompt = ar.encode_prompts(["a red circle", "a dog"], 64, 64)
    uniforms = torch.rand(2, prompt.T, generator=torch.Generator().manual_seed(0))
    head = ar.model.lm_head.weight
    moved = head.detach() + 0.5 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(1))

    @contextmanager
    def teacher():
        own = head.data
        head.data = moved.detach()
        with torch.no_grad():
            yield
        head.data = own

    return ar, ar.rollout(prompt, 1, uniforms, temperature=0.8, top_p=request.param), teacher


def every_code(ar, rollout) -> torch.Tensor:
    """Log-probs [B, K] of the last token's codes, scored one by one as the rollout's own are."""
    columns = []
    for code in range(ar.num_codes):
        tokens = rollout.tokens.clone()
        tokens[:, -1] = code
        columns.append(ar(rollout.prompt, tokens, temperature=rollout.temperature, support=rollout.support)[:, -1])
    return torch.stack(columns, dim=1).detach()


def test_the_kl_of_a_token_is_the_sum_over_the_codes_that_can_be_drawn(plans):
    ar, rollout, teacher = plans
    own = every_code(ar, rollout)
    with teacher():
        theirs = every_code(ar, rollout)
        options = {"temperature": rollout.temperature, "support": rollout.support}
        others = ar.distributions(rollout.prompt, rollout.tokens, **options)
    found = ar(rollout.prompt, rollout.tokens, others=others, **options)
    kept = own > -1e30
    torch.testing.assert_close(own.exp().sum(1), torch.ones(2), atol=1e-4, rtol=0)
    wanted = torch.where(kept, own.exp() * (own - theirs), 0.0).sum(1)
    torch.testing.assert_close(found[1][:, -1], wanted, atol=1e-5, rtol=1e-4)
    assert (wanted > 1e-3).all()
    assert kept.all() if rollout.support is None else kept.sum(1).max() < ar.num_codes
    torch.testing.assert_close(found[0], ar(rollout.prompt, rollout.tokens, **options))


def test_the_loss_is_the_mean_over_the_tokens_and_falls_towards_the_teacher(plans):
    ar, rollout, teacher = plans
    (term,) = token_terms(ar, ar, teacher, rollout)
    options = {"temperature": rollout.temperature, "support": rollout.support}
    with teacher():
        others = ar.distributions(rollout.prompt, rollout.tokens, **options)
    wanted = ar(rollout.prompt, rollout.tokens, others=others, **options)[1].mean()
    torch.testing.assert_close(term.loss, wanted)
    assert term.rows == 2 and term.metrics["kl"] == term.loss.detach()
    head = ar.model.lm_head.weight
    (gradient,) = torch.autograd.grad(term.loss, head)
    own = head.data
    head.data = own - gradient / gradient.norm() * 0.1
    lower = next(token_terms(ar, ar, teacher, rollout)).loss.item()
    head.data = own
    assert lower < term.loss.item() - 1e-5


def test_a_student_that_is_its_teacher_has_no_kl_and_no_gradient(plans):
    ar, rollout, _ = plans
    (term,) = token_terms(ar, ar, torch.no_grad, rollout)
    assert term.loss.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(term.loss, ar.model.lm_head.weight)
    assert gradient.abs().max() < 1e-5


def step_kl(step: int) -> float:
    """|mu - mu'|^2 / (2 std^2) per dim, over two rows of two numbers."""
    total = 0.0
    for row in (0, 1):
        (now, std), (wanted, _) = mean_and_std(step, row, NEW), mean_and_std(step, row, REFERENCE)
        total += sum(((a - b) / std) ** 2 / 2 for a, b in zip(now, wanted, strict=True))
    return total / 4


def test_the_kl_of_a_step_is_that_of_the_two_gaussians_at_the_students_latents():
    policy = ToyVelocity(NEW)
    terms = list(step_terms(policy, policy, partial(policy.at, REFERENCE), drawn(NEW)))
    for step, term in enumerate(terms):
        assert term.metrics["kl"].item() == pytest.approx(step_kl(step), rel=1e-4)
        assert term.loss.item() == pytest.approx(step_kl(step) / 2, rel=1e-4) and term.rows == 2
    seen = [(round(call["weight"], 4), call["gradient"], call["guidance"]) for call in policy.calls]
    assert seen == [(REFERENCE, False, 2.5), (NEW, True, 2.5)] * 2


def test_its_gradient_leads_to_the_teacher():
    """The KL is (w - w_teacher)^2 times a constant: its slope is 2 KL / (w - w_teacher)."""
    policy = ToyVelocity(NEW)
    for step, term in enumerate(step_terms(policy, policy, partial(policy.at, REFERENCE), drawn(NEW))):
        (gradient,) = torch.autograd.grad(term.loss, policy.weight)
        assert gradient.item() == pytest.approx(2 * step_kl(step) / 2 / (NEW - REFERENCE), rel=1e-3)
