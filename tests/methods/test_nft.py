"""DiffusionNFT on a policy of one weight, against its formula with numbers put in."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from glm_training.methods.losses import DiTPolicies, MatchingDraws
from glm_training.methods.nft import NFT
from tests.methods.toys import ToyVelocity, trajectory_of

FINAL = torch.tensor([[[[1.0, -2.0]]], [[[3.0, 0.0]]]])
NOISES = {0: torch.tensor([[[[0.5, 1.0]]], [[[-1.0, 2.0]]]]), 1: torch.tensor([[[[1.5, -1.0]]], [[[0.0, 0.25]]]])}
SIGMAS, TIMES = {0: 1.0, 1: 0.8}, {0: 0.9, 1: 0.6}
ADVANTAGES = [1.0, -3.0]
NEW, OLD, REFERENCE = 0.7, 0.4, 0.9


def losses_of(policy: ToyVelocity, *, kl_coef: float = 0.0, guidance_scale: float = 1.0):
    method = NFT(beta=0.5, advantage_max=2.0, kl_coef=kl_coef)
    policies = DiTPolicies(policy, policy, partial(policy.at, REFERENCE), partial(policy.at, OLD))
    trajectory = trajectory_of(FINAL, guidance_scale=guidance_scale)
    return list(method.losses(policies, trajectory, torch.tensor(ADVANTAGES), MatchingDraws((0, 1), NOISES.get)))


def points_of(clean: list[float], noise: list[float], sigma: float) -> list[float]:
    return [(1 - sigma) * x0 + sigma * e for x0, e in zip(clean, noise, strict=True)]


def by_hand(level: int) -> float:
    """2 mean(r l+ + (1 - r) l-) / 0.5 at one level, row by row in plain numbers."""
    sigma, total = SIGMAS[level], 0.0
    for row, advantage in enumerate(ADVANTAGES):
        clean, noise = FINAL[row].flatten().tolist(), NOISES[level][row].flatten().tolist()
        errors = {1: [], -1: []}
        for x0, e in zip(clean, noise, strict=True):
            x = (1 - sigma) * x0 + sigma * e
            new, old = NEW * x + TIMES[level], OLD * x + TIMES[level]
            for sign, kept in errors.items():
                kept.append(x - sigma * (old + sign * 0.5 * (new - old)) - x0)
        branch = {
            sign: sum(error**2 for error in kept) / sum(abs(error) for error in kept) for sign, kept in errors.items()
        }
        share = min(max(advantage / 4 + 0.5, 0), 1)
        total += share * branch[1] + (1 - share) * branch[-1]
    return 2.0 * total / 2 / 0.5


def test_the_loss_is_the_mean_over_the_levels_of_the_formula():
    policy = ToyVelocity(NEW)
    terms = losses_of(policy)
    for level, term in zip((0, 1), terms, strict=True):
        assert term.loss.item() == pytest.approx(by_hand(level) / 2, rel=1e-5)
        assert term.rows == 2 and "kl" not in term.metrics
    assert terms[0].metrics["old_deviation"].item() == pytest.approx(
        sum((0.3 * e) ** 2 for e in [0.5, 1, -1, 2]) / 4,
        rel=1e-5,
    )


def test_the_kl_is_the_squared_distance_from_the_reference():
    plain, kept = losses_of(ToyVelocity(NEW)), losses_of(ToyVelocity(NEW), kl_coef=0.25)
    for level, without, term in zip((0, 1), plain, kept, strict=True):
        sigma = SIGMAS[level]
        points = points_of([1, -2, 3, 0], NOISES[level].flatten().tolist(), sigma)
        kl = sum(((NEW - REFERENCE) * x) ** 2 for x in points) / 4
        assert term.metrics["kl"].item() == pytest.approx(kl, rel=1e-5)
        assert (term.loss - without.loss).item() == pytest.approx(0.25 * kl / 2, rel=1e-4)


def test_old_and_reference_are_asked_without_gradient_under_the_rollouts_guidance():
    policy = ToyVelocity(NEW)
    losses_of(policy, kl_coef=0.25, guidance_scale=3.0)
    seen = [(round(call["weight"], 4), call["gradient"], call["guidance"]) for call in policy.calls]
    assert seen == [(OLD, False, 3.0), (REFERENCE, False, 3.0), (NEW, True, 3.0)] * 2
    assert [call["times"].tolist() for call in policy.calls[::3]] == [[900, 900], [600, 600]]


def test_only_the_trained_velocity_has_a_gradient():
    """At the old policy's own weight the gradient is -2 sigma A (x0_hat - x0) / (n mean|x0_hat - x0| B) in v."""
    policy = ToyVelocity(OLD)
    (gradient,) = torch.autograd.grad(losses_of(policy)[1].loss, policy.weight)
    wanted = 0.0
    for row, advantage in enumerate([1.0, -2.0]):  # clipped at 2
        points = points_of(FINAL[row].flatten().tolist(), NOISES[1][row].flatten().tolist(), 0.8)
        errors = [x - 0.8 * (OLD * x + 0.6) - x0 for x, x0 in zip(points, FINAL[row].flatten().tolist(), strict=True)]
        size = sum(abs(error) for error in errors) / 2
        wanted += sum(-2 * 0.8 * advantage * e / (2 * size * 2) * x for e, x in zip(errors, points, strict=True))
    assert gradient.item() == pytest.approx(wanted / 2, rel=1e-4)
