"""STAGE's similarity of tokens, their weights and the entropy reward, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from glm_training.algorithms.stage import entropy_bonus, similarity_weights, token_similarity

EAST, NORTH, WEST, NORTHEAST = [2.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [3.0, 3.0]
VECTORS = torch.tensor(
    [
        [EAST, NORTH],  # the best plan
        [EAST, WEST],  # good
        [NORTHEAST, NORTH],  # bad
        [WEST, EAST],  # the worst
    ]
)
ADVANTAGES = torch.tensor([1.5, 0.5, -0.5, -1.5])
HALF = math.sqrt(0.5)
NAN = math.nan


def test_a_token_is_compared_with_those_at_its_place_of_plans_that_fared_otherwise() -> None:
    """Whatever the length of the vectors: of the first plan, first token, cos 45 degrees and cos 180 degrees."""
    wanted = [
        [(HALF - 1) / 2, (1 + 0) / 2],
        [(HALF - 1) / 2, (0 - 1) / 2],
        [(HALF + HALF) / 2, (1 + 0) / 2],
        [(-1 - 1) / 2, (0 - 1) / 2],
    ]
    found = token_similarity(VECTORS, ADVANTAGES)
    torch.testing.assert_close(found, torch.tensor(wanted))
    assert torch.equal(token_similarity(VECTORS, 7 * ADVANTAGES), found), "the signs alone decide"


def test_a_plan_without_an_advantage_fared_otherwise_than_all_and_one_without_a_score_like_none() -> None:
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0])
    found = token_similarity(VECTORS, advantages)[:, 0]
    assert found.tolist() == pytest.approx(
        [(1 + HALF - 1) / 3, (1 + HALF - 1) / 3, (HALF + HALF - HALF) / 3, (-1 - 1 - HALF) / 3], abs=1e-6
    )
    counted = torch.tensor([True, True, True, False])
    found = token_similarity(VECTORS, advantages, counted)[:, 0]
    assert found.tolist() == pytest.approx([(1 + HALF) / 2, (1 + HALF) / 2, (HALF + HALF) / 2, 0.0])
    lone = token_similarity(VECTORS[:2], torch.tensor([1.0, 2.0]))
    assert not lone.any()


def test_weights_by_hand() -> None:
    similarity = torch.tensor([[1.0, 0.0], [-1.0, -0.5]])
    weights = similarity_weights(similarity)
    assert weights.advantage.flatten().tolist() == pytest.approx([0.0, 0.5 / 0.5625, 1 / 0.5625, 0.75 / 0.5625])
    assert weights.kl.tolist() == [[1.0, 1.0], [0.5, 0.75]]
    assert weights.advantage.mean().item() == pytest.approx(1.0)
    one = similarity_weights(similarity, torch.tensor([False, True]))
    assert one.advantage[1].tolist() == pytest.approx([1 / 0.875, 0.75 / 0.875])


def test_plans_that_are_all_one_have_no_advantage_to_share() -> None:
    weights = similarity_weights(torch.ones(3, 2))
    assert weights.advantage.tolist() == [[0.0, 0.0]] * 3 and weights.kl.tolist() == [[1.0, 1.0]] * 3


def test_the_entropy_reward_parts_plans_that_share_the_best_reward() -> None:
    """1 / (1 + gap^2) with gaps 0, 1, 3 and 2: means over the first two, over all of the second prompt."""
    rewards = torch.tensor([[1.0, 1.0, 0.5, NAN], [0.0, 0.0, 0.0, 0.0], [0.9, 1.0, 0.2, 0.3], [NAN] * 4])
    entropies = torch.tensor([[3.0, 4.0, 0.0, 1.0]]).repeat(4, 1)
    found = entropy_bonus(rewards, entropies, torch.full((4, 4), 3.0))
    assert found[0].tolist() == pytest.approx([0.25, -0.25, 0.0, 0.0])
    near = [1.0, 0.5, 0.1, 0.2]
    assert found[1].tolist() == pytest.approx([value - 0.45 for value in near])
    assert not found[2:].any(), "a lone best plan gains nothing, and neither does one without a score"


def test_they_refuse() -> None:
    with pytest.raises(ValueError, match=r"vectors must be a non-empty tensor of shape \[N, T, C\]"):
        token_similarity(VECTORS[0], ADVANTAGES)
    with pytest.raises(ValueError, match=r"advantages must have shape \[4\], got \[3\]"):
        token_similarity(VECTORS, ADVANTAGES[:3])
    with pytest.raises(ValueError, match=r"counted must have the shape of advantages \[4\], got \[1\]"):
        token_similarity(VECTORS, ADVANTAGES, torch.tensor([True]))
    with pytest.raises(ValueError, match=r"counted must have shape \[3\], got \[1\]"):
        similarity_weights(torch.ones(3, 2), torch.tensor([True]))
    with pytest.raises(ValueError, match="reference_entropies holds NaN"):
        entropy_bonus(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[1.0, NAN]]))
