"""DGPO on a policy of one weight, against its formula with numbers put in."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from glm_training.methods.dgpo import DGPO
from glm_training.methods.losses import DiTPolicies, MatchingDraws
from tests.methods.toys import ToyVelocity, trajectory_of

FINAL = [[1.0, -2.0], [3.0, 0.0], [-1.0, 0.5]]
NOISES = {0: [[0.5, 1.0], [-1.0, 2.0], [0.25, 0.0]], 1: [[1.5, -1.0], [0.0, 0.25], [2.0, -0.5]]}
LEVELS = {0: (1.0, 0.9), 1: (0.8, 0.6)}
ADVANTAGES = [1.0, -1.0, 0.5]
PLANS = [3, 3, 5]
NEW, REFERENCE = 0.7, 0.4
BETA = 0.5


def terms_of(policy: ToyVelocity, old: torch.Tensor | None = None, *, kl_coef: float = 0.0, clip=(0.1, 0.1)):
    method = DGPO(BETA, clip, kl_coef)
    policies = DiTPolicies(policy, policy, partial(policy.at, REFERENCE))
    noises = {level: torch.tensor(noise).view(3, 1, 1, 2) for level, noise in NOISES.items()}
    trajectory = trajectory_of(torch.tensor(FINAL).view(3, 1, 1, 2), guidance_scale=2.5)
    draws = MatchingDraws((1, 0), noises.get)  # type: ignore[arg-type]
    return list(method.losses(policies, trajectory, torch.tensor(ADVANTAGES), torch.tensor(PLANS), draws, old))


def velocities(level: int, row: int, weight: float) -> list[float]:
    sigma, time = LEVELS[level]
    points = [(1 - sigma) * x0 + sigma * e for x0, e in zip(FINAL[row], NOISES[level][row], strict=True)]
    return [weight * x + time for x in points]


def error(level: int, row: int, weight: float) -> float:
    targets = [e - x0 for x0, e in zip(FINAL[row], NOISES[level][row], strict=True)]
    return sum((v - t) ** 2 for v, t in zip(velocities(level, row, weight), targets, strict=True)) / 2


def by_hand(level: int) -> float:
    moved = [a * (error(level, row, NEW) - error(level, row, REFERENCE)) for row, a in enumerate(ADVANTAGES)]
    margins = [-BETA * (moved[0] + moved[1]) / 2, -BETA * moved[2]]
    return sum(n * math.log1p(math.exp(-m)) for n, m in zip((2, 1), margins, strict=True)) / 3 / BETA


def test_each_level_prefers_the_good_side_of_each_plan_and_all_are_averaged():
    policy = ToyVelocity(NEW)
    for level, term in zip((1, 0), terms_of(policy), strict=True):
        assert term.loss.item() == pytest.approx(by_hand(level) / 2, rel=1e-4)
        assert term.rows == 3 and "kl" not in term.metrics and term.metrics["clip_fraction"] == 0
        errors = [error(level, row, NEW) for row in range(3)]
        assert term.metrics["matching_error"].item() == pytest.approx(sum(errors) / 3, rel=1e-4)
    seen = [(round(call["weight"], 4), call["gradient"], call["guidance"]) for call in policy.calls]
    assert seen == [(REFERENCE, False, 2.5), (NEW, True, 2.5)] * 2


def test_its_gradient_is_that_of_the_weighted_errors():
    """sum A sigmoid(-m) de/dw / B; de/dw is 2 mean (v - target) x."""
    policy = ToyVelocity(NEW)
    (gradient,) = torch.autograd.grad(terms_of(policy)[0].loss, policy.weight)
    moved = [a * (error(1, row, NEW) - error(1, row, REFERENCE)) for row, a in enumerate(ADVANTAGES)]
    margins = [-BETA * (moved[0] + moved[1]) / 2] * 2 + [-BETA * moved[2]]
    step, wanted = 1e-4, 0.0
    for row, advantage in enumerate(ADVANTAGES):
        slope = (error(1, row, NEW + step) - error(1, row, NEW - step)) / (2 * step)
        wanted += advantage / (1 + math.exp(margins[row])) * slope / 3
    assert gradient.item() == pytest.approx(wanted / 2, rel=1e-4) and abs(wanted) > 0.05


def test_the_kl_is_the_squared_distance_from_the_reference():
    plain, kept = terms_of(ToyVelocity(NEW)), terms_of(ToyVelocity(NEW), kl_coef=0.3)
    for level, without, term in zip((1, 0), plain, kept, strict=True):
        pairs = [zip(velocities(level, row, NEW), velocities(level, row, REFERENCE), strict=True) for row in range(3)]
        kl = sum((a - b) ** 2 for pair in pairs for a, b in pair) / 6
        assert term.metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
        assert (term.loss - without.loss).item() == pytest.approx(0.3 * kl / 2, rel=1e-3)


def test_later_updates_are_clipped_against_the_policy_that_drew():
    method = DGPO(BETA, (0.1, 0.1), 0.0)
    trajectory = trajectory_of(torch.tensor(FINAL).view(3, 1, 1, 2))
    noises = {level: torch.tensor(noise).view(3, 1, 1, 2) for level, noise in NOISES.items()}
    old = method.densities(ToyVelocity(0.2), trajectory, MatchingDraws((1, 0), noises.get))  # type: ignore[arg-type]
    for column, level in enumerate((1, 0)):
        assert old[:, column].tolist() == pytest.approx([-error(level, row, 0.2) for row in range(3)], rel=1e-4)
    for level, term in zip((1, 0), terms_of(ToyVelocity(NEW), old), strict=True):
        clipped = 0
        for row, advantage in enumerate(ADVANTAGES):
            ratio = math.exp(error(level, row, 0.2) - error(level, row, NEW))
            clipped += ratio > 1.1 if advantage > 0 else ratio < 0.9
        assert term.metrics["clip_fraction"].item() == pytest.approx(clipped / 3) and clipped > 0
    assert not old.requires_grad


def test_without_a_reference_it_refuses():
    policy = ToyVelocity(NEW)
    trajectory = trajectory_of(torch.tensor(FINAL).view(3, 1, 1, 2))
    terms = DGPO(BETA, (0.1, 0.1), 0.0).losses(
        DiTPolicies(policy, policy), trajectory, torch.ones(3), torch.zeros(3), MatchingDraws((0,), lambda _: None)
    )
    with pytest.raises(ValueError, match="none was kept"):
        next(terms)
