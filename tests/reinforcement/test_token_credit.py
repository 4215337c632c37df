"""Entropies of plans and weights of their tokens in a run: what was drawn, scored, and looked up in the codebook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glm_training.reinforcement.token_credit import measure_entropies, weigh_tokens
from glm_training.trainers import reward_trainer
from tests.runs import trainer_of

STAGE = [
    "model.component=ar",
    "reward.grpo.num_samples=3",
    "rollout.temperature=0.8",
    "rollout.top_p=0.9",
    "rollout.micro_batch_size=2",
    "reward.grpo.ar.similarity_weighting=true",
    "reward.grpo.ar.entropy_reward=0.4",
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A trainer and the scored rollout of two prompts with three plans each."""
    trainer = trainer_of(tmp_path_factory.mktemp("run"), *STAGE)
    return trainer, trainer.score(trainer.draw(*trainer.next_batch(), on_step=None))


def test_entropies_are_those_of_the_distribution_that_drew_and_of_the_reference(drawn):
    trainer, chunk = drawn
    head, plans = trainer.family.ar.model.lm_head.weight, chunk.rollout.plans
    before = head.detach().clone()
    with torch.no_grad():
        head.mul_(1.5)  # else the two were one
    figures = measure_entropies(trainer.learning(), trainer.ar_method, [chunk])
    options = {"temperature": 0.8, "support": plans.support}
    logits = []
    for scale in (1.5, 1.0):
        with torch.no_grad():
            head.copy_(before * scale)
            logits.append(trainer.family.ar(plans.prompt, plans.tokens, entropy=True, **options)[1].mean(dim=1))
    torch.testing.assert_close(chunk.entropies, torch.stack(logits), atol=1e-5, rtol=1e-5)
    assert figures["ar/drawn_entropy"] == pytest.approx(logits[0].mean().item(), rel=1e-5)
    assert figures["ar/reference_entropy"] == pytest.approx(logits[1].mean().item(), rel=1e-5)
    assert (logits[0] - logits[1]).abs().min() > 1e-3


def test_each_prompts_plans_are_compared_in_the_frozen_codebook(drawn):
    trainer, chunk = drawn
    chunk.plan_advantages = torch.tensor([1.0, 1.0, -2.0, 0.5, -1.0, 0.5])
    weigh_tokens([chunk], trainer.family.ar.code_vectors)
    codebook = trainer.family.ar.model.model.vqmodel.quantize.embedding.weight.detach()
    tokens = chunk.rollout.plans.tokens
    similarity = []
    for row, others in ((0, [2]), (1, [2]), (2, [0, 1]), (3, [4]), (4, [3, 5]), (5, [4])):
        own = codebook[tokens[row]]
        similarity.append(
            sum(F.cosine_similarity(own, codebook[tokens[other]], dim=1) for other in others) / len(others)
        )
    for rows in (slice(0, 3), slice(3, 6)):
        unlike = (1 - torch.stack(similarity[rows])) / 2
        wanted = torch.stack([unlike / unlike.mean(), 0.5 + (2 - 2 * unlike).clamp(0, 1) / 2], dim=1)
        torch.testing.assert_close(chunk.token_weights[rows], wanted, atol=1e-5, rtol=1e-5)


def test_a_plan_that_the_loss_leaves_out_has_no_say_in_the_others_weights(drawn):
    """The AR half's own metrics do not apply to plan 0: plans 1 and 2 are compared with each other alone."""
    trainer, chunk = drawn
    chunk.plan_advantages = torch.tensor([0.0, 0.7, -0.7, 0.5, -1.0, 0.5])
    chunk.left_out = {"ar": torch.tensor([True, False, False, False, False, False])}
    try:
        weigh_tokens([chunk], trainer.family.ar.code_vectors)
    finally:
        chunk.left_out = {}
    codebook = trainer.family.ar.model.model.vqmodel.quantize.embedding.weight.detach()
    own = codebook[chunk.rollout.plans.tokens]
    unlike = (1 - F.cosine_similarity(own[1], own[2], dim=1)) / 2
    for row in (1, 2):
        wanted = torch.stack([unlike / unlike.mean(), 0.5 + (2 - 2 * unlike).clamp(0, 1) / 2])
        torch.testing.assert_close(chunk.token_weights[row], wanted, atol=1e-5, rtol=1e-5)


def test_the_step_learns_from_weighted_tokens_and_passes_the_gate(tmp_path, monkeypatch):
    """The first loss of a run: at ratio 1 minus the mean of A w, and the KL is 0."""
    trainer = trainer_of(tmp_path, *STAGE, "rollout.top_p=1.0", "rollout.temperature=1.0", "reward.combine=sum")
    seen = {}

    def look(chunks, vectors):
        weigh_tokens(chunks, vectors)
        seen["weighed"] = (chunks[0].plan_advantages[:, None] * chunks[0].token_weights[:, 0]).mean().item()

    monkeypatch.setattr(reward_trainer, "weigh_tokens", look)
    figures = trainer.training_step()
    assert figures["ar/loss"] == pytest.approx(-seen["weighed"], abs=1e-5) and abs(seen["weighed"]) > 1e-4
    assert figures["gate/ar_log_prob_max"] < 1e-4 and figures["ar/kl"] < 1e-8
    assert figures["ar/drawn_entropy"] == pytest.approx(figures["ar/reference_entropy"], rel=1e-6)
