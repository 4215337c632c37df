"""The credit tree on a task whose answer is known: what its share reads, and where it learns from fewer samples."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.credit_tree import ARMS, TASKS, Problem, samples_to_learn, share_at_start
from glm_training.algorithms.advantages import (
    group_advantages,
    mean_over_renders,
    plan_render_advantages,
    plan_render_gdpo,
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("task", "low", "high"), [("plan", 0.9, 1.0), ("render", 0.0, 0.1), ("both", 0.3, 0.7), ("mostly plan", 0.9, 1.0)]
)
def test_the_share_names_the_half_that_decides(task: str, low: float, high: float) -> None:
    shares = share_at_start(TASKS[task], seeds=list(range(4)), prompts=256)
    assert all(low < share < high or share == low for share in shares), shares


def samples(task: str, arm: str, rates: tuple[float, float], seeds: int = 8) -> torch.Tensor:
    """[S] samples per prompt until both halves have learned, at the learning rates the benchmark chose for this arm."""
    reached, _ = samples_to_learn(TASKS[task], ARMS[arm], Problem(list(range(seeds)), 60), [rates], 60)
    return reached[0]


def test_when_the_plan_dominates_the_tree_learns_both_halves_from_fewer_samples() -> None:
    tree = samples("mostly plan", "tree 4x4", (0.2, 0.1))
    flat = {rates: samples("mostly plan", "flat 4x4", rates) for rates in ((0.4, 0.1), (0.2, 0.1), (0.4, 0.2))}
    assert tree.isfinite().all()
    for rates, needed in flat.items():
        assert (tree < needed).all(), (rates, tree.tolist(), needed.tolist())
        assert (needed.clamp(max=960) / tree).mean() > 1.2


def test_samples_spent_on_plans_alone_when_the_share_says_plan() -> None:
    flat, tree = samples("plan", "flat 4x4", (0.4, 0.05)), samples("plan", "tree 16x1", (0.4, 0.05))
    assert tree.mean() < flat.mean() / 1.5


def test_the_plans_own_credit_is_the_flat_one_averaged_over_its_renders() -> None:
    """So where only the plan decides, no tree can beat flat advantages over the same samples: same direction."""
    rewards = draw(0, 6, 4, 5)
    flat = group_advantages(rewards.flatten(1), scale="none").view(6, 4, 5).mean(2)
    torch.testing.assert_close(plan_render_advantages(rewards, scale="none").plan, flat)
    grouped = group_advantages(rewards.flatten(1)).view(6, 4, 5).mean(2)
    tree = plan_render_advantages(rewards).plan
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(tree, grouped), torch.ones(6))


def test_a_renders_own_credit_is_the_flat_one_without_its_plans() -> None:
    rewards = draw(1, 6, 4, 5) + 10 * draw(2, 6, 4, 1)
    flat = group_advantages(rewards.flatten(1), scale="none").view(6, 4, 5)
    render = plan_render_advantages(rewards, scale="none").render
    torch.testing.assert_close(render, flat - flat.mean(2, keepdim=True))
    assert flat.var() > 20 * render.var(), "what the flat advantage adds to the render is the luck of its plan"


IN_ANOTHER_ORDER = torch.tensor([[[a, b, c] for a, b, c in itertools.permutations([1 / 4, 5 / 6, 5 / 7])]])
"""[1, 6, 3]: six plans with the rewards 1/4, 5/6 and 5/7, each in an order of its own."""


def test_plans_with_the_same_rewards_in_another_order_are_equal() -> None:
    assert len(set(IN_ANOTHER_ORDER.sum(dim=2).flatten().tolist())) > 1, "fp32 sums them to different numbers"
    scored = torch.ones_like(IN_ANOTHER_ORDER, dtype=torch.bool)
    scored[0, 1, 0] = False
    means = mean_over_renders(IN_ANOTHER_ORDER, scored)
    exact = IN_ANOTHER_ORDER[0, 0].double().mean().float().item()
    other = IN_ANOTHER_ORDER[0, 1, 1:].double().mean().float().item()
    assert means.tolist() == [[exact, other, exact, exact, exact, exact]]
    assert not mean_over_renders(IN_ANOTHER_ORDER, ~torch.ones_like(scored)).any()
    for scale in ("group", "batch", "none"):
        assert not plan_render_advantages(IN_ANOTHER_ORDER, scale=scale, eps=0).plan.any()
    assert not plan_render_gdpo({"a": IN_ANOTHER_ORDER}, {"a": 1.0})[0].any(), "was -1.5 by rounding alone"
