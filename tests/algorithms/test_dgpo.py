"""The group preference loss against its formula with numbers put in, and against Diffusion-DPO on pairs."""

from __future__ import annotations

import math

import pytest
import torch

from glm_training.algorithms.dgpo import group_preference_loss
from glm_training.algorithms.preference import diffusion_dpo_loss

ERRORS = [0.5, 0.25, 1.0, 0.75, 0.1]
REFERENCE = [0.4, 0.35, 0.8, 0.75, 0.3]
ADVANTAGES = [1.0, -1.0, 1.5, -0.5, -1.0]
GROUPS = [4, 4, 9, 9, 9]
OLD = [0.7, 0.2, 1.0, 0.5, 0.1]


def rows(values: list[float], *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, requires_grad=grad)


def loss_of(errors: torch.Tensor, **options):
    options = {"beta": 2.0} | options
    return group_preference_loss(errors, rows(REFERENCE), rows(ADVANTAGES), torch.tensor(GROUPS), **options)


def margins(beta: float) -> list[float]:
    """Of the two groups: of the first -beta / 2 * (.1 + .1)."""
    terms = [a * (e - r) for a, e, r in zip(ADVANTAGES, ERRORS, REFERENCE, strict=True)]
    return [-beta * sum(terms[:2]) / 2, -beta * sum(terms[2:]) / 3]


def test_by_hand() -> None:
    for beta in (2.0, 50.0):
        first, second = margins(beta)
        result = loss_of(rows(ERRORS), beta=beta)
        wanted = (2 * math.log1p(math.exp(-first)) + 3 * math.log1p(math.exp(-second))) / 5 / beta
        assert result.loss.item() == pytest.approx(wanted, rel=1e-5)
        assert result.margins.tolist() == pytest.approx([first] * 2 + [second] * 3, rel=1e-5)
    assert margins(2.0)[0] == pytest.approx(-0.2) and margins(2.0)[1] == pytest.approx(-2 / 3 * 0.5)
    assert result.accuracy.item() == 0 and result.clip_fraction.item() == 0


def test_the_slope_is_the_advantage_by_how_wrong_the_group_still_is() -> None:
    """A sigmoid(-m) / B: errors of good samples are to fall, those of bad ones to rise."""
    errors = rows(ERRORS, grad=True)
    loss_of(errors).loss.backward()
    wrong = [1 / (1 + math.exp(m)) for m in margins(2.0)]
    wanted = [a * wrong[k] / 5 for a, k in zip(ADVANTAGES, (0, 0, 1, 1, 1), strict=True)]
    assert errors.grad is not None
    assert errors.grad.tolist() == pytest.approx(wanted, rel=1e-5)


def test_at_the_reference_the_loss_is_ln_2_over_beta_and_nothing_is_preferred() -> None:
    errors = rows(REFERENCE, grad=True)
    result = loss_of(errors, beta=100.0)
    assert result.loss.item() == pytest.approx(math.log(2) / 100, rel=1e-6)
    assert result.accuracy.item() == 0.5 and not result.margins.any()
    result.loss.backward()
    assert errors.grad is not None
    assert errors.grad.tolist() == pytest.approx([a / 2 / 5 for a in ADVANTAGES], rel=1e-6)


def test_a_pair_is_diffusion_dpo_at_half_the_groups_beta() -> None:
    """m = -beta / 2 [(e_c - e_r) - ...] in both, with advantages of plus and minus one."""
    chosen, rejected = rows(ERRORS[:1]), rows(ERRORS[1:2])
    pair = diffusion_dpo_loss(chosen, rejected, rows(REFERENCE[:1]), rows(REFERENCE[1:2]), beta=3.0)
    group = group_preference_loss(
        rows(ERRORS[:2]), rows(REFERENCE[:2]), rows([1.0, -1.0]), torch.tensor([0, 0]), beta=3.0
    )
    assert group.loss.item() * 3.0 == pytest.approx(pair.loss.item(), rel=1e-6)


def test_the_clip_stops_what_has_moved_far_the_way_it_is_pushed() -> None:
    """exp(e_old - e): 1.22, .95, 1, .78, 1. The first is good and has fallen, the fourth bad and has risen."""
    errors, free = rows(ERRORS, grad=True), rows(ERRORS, grad=True)
    kept = loss_of(errors, old_errors=rows(OLD), clip=(0.1, 0.2))
    plain = loss_of(free)
    assert kept.loss.item() == plain.loss.item() and kept.clip_fraction.item() == pytest.approx(0.4)
    kept.loss.backward()
    plain.loss.backward()
    assert errors.grad is not None and free.grad is not None
    assert errors.grad.tolist() == [0.0, free.grad[1].item(), free.grad[2].item(), 0.0, free.grad[4].item()]
    # the other way round neither is clipped: their updates undo what went too far
    undone = group_preference_loss(
        rows(ERRORS),
        rows(REFERENCE),
        -rows(ADVANTAGES),
        torch.tensor(GROUPS),
        beta=2.0,
        old_errors=rows(OLD),
        clip=(0.1, 0.2),
    )
    assert undone.clip_fraction.item() == 0
    for clip, share in (((0.3, 0.3), 0.0), ((0.1, 0.3), 0.2), ((0.3, 0.2), 0.2)):
        found = loss_of(rows(ERRORS), old_errors=rows(OLD), clip=clip).clip_fraction.item()
        assert found == pytest.approx(share), clip


def test_only_the_policys_errors_have_a_gradient() -> None:
    reference, advantages = rows(REFERENCE, grad=True), rows(ADVANTAGES, grad=True)
    errors, old = rows(ERRORS, grad=True), rows(OLD, grad=True)
    result = group_preference_loss(
        errors, reference, advantages, torch.tensor(GROUPS), beta=2.0, old_errors=old, clip=(9.0, 9.0)
    )
    result.loss.backward()
    assert errors.grad is not None and reference.grad is None and advantages.grad is None and old.grad is None


def test_it_refuses() -> None:
    with pytest.raises(ValueError, match="old_errors are needed for a clip"):
        loss_of(rows(ERRORS), clip=(0.1, 0.1))
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got 0"):
        loss_of(rows(ERRORS), beta=0.0)
    with pytest.raises(ValueError, match=r"reference_errors must have the shape of errors \[4\], got \[5\]"):
        loss_of(rows(ERRORS[:4]))
    with pytest.raises(ValueError, match="errors holds NaN"):
        loss_of(rows([*ERRORS[:4], math.nan]))
