"""Preference losses: their value at the start, their slopes, which way they push, and min-SNR weights by hand."""

from __future__ import annotations

import math

import pytest
import torch

from glm_training.algorithms.preference import diffusion_dpo_loss, min_snr_weights, sequence_dpo_loss

NAMES = {
    diffusion_dpo_loss: ("chosen_error", "rejected_error", "reference_chosen_error", "reference_rejected_error"),
    sequence_dpo_loss: (
        "chosen_log_prob",
        "rejected_log_prob",
        "reference_chosen_log_prob",
        "reference_rejected_log_prob",
    ),
}
both = pytest.mark.parametrize("loss", NAMES)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def draw(seed: int) -> list[torch.Tensor]:
    return list(torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)))


def test_diffusion_by_hand() -> None:
    # brackets: (0.1 - 0.3) - (0.2 - 0.2) = -0.2 and (0.5 - 0.2) - (0.3 - 0.3) = 0.3; times -4/2: 0.4 and -0.6
    result = diffusion_dpo_loss(rows(0.1, 0.5), rows(0.3, 0.2), rows(0.2, 0.3), rows(0.2, 0.3), beta=4.0)
    expected = (math.log1p(math.exp(-0.4)) + math.log1p(math.exp(0.6))) / 2
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)
    assert result.accuracy.item() == 0.5
    assert result.margin.item() == pytest.approx(-0.1, abs=1e-6)
    weighted = diffusion_dpo_loss(
        rows(0.1, 0.5), rows(0.3, 0.2), rows(0.2, 0.3), rows(0.2, 0.3), beta=4.0, weights=rows(0.5, 2.0)
    )
    expected = (math.log1p(math.exp(-0.2)) + math.log1p(math.exp(1.2))) / 2
    assert weighted.loss.item() == pytest.approx(expected, abs=1e-6)


def test_sequence_by_hand() -> None:
    # (-3 + 5) - (-4 + 4) = 2, times 0.5: 1
    result = sequence_dpo_loss(rows(-3.0), rows(-5.0), rows(-4.0), rows(-4.0), beta=0.5)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-6)
    assert result.accuracy.item() == 1 and result.margin.item() == pytest.approx(1.0)


@both
def test_policy_equal_to_reference_gives_ln_2(loss) -> None:
    chosen, rejected, *_ = draw(0)
    result = loss(chosen, rejected, chosen.clone(), rejected.clone(), beta=5000.0)
    assert result.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert result.margin.item() == 0 and result.accuracy.item() == 0.5


@pytest.mark.parametrize(("loss", "slope"), [(diffusion_dpo_loss, 5000 / 4), (sequence_dpo_loss, -5000 / 2)])
def test_slopes_at_the_start(loss, slope: float) -> None:
    values = draw(1)[:2]
    leaves = [*values, *(value.clone() for value in values)]
    for leaf in leaves:
        leaf.requires_grad_()
    loss(*leaves, beta=5000.0).loss.backward()
    torch.testing.assert_close(leaves[0].grad, torch.full((6,), slope / 6))
    torch.testing.assert_close(leaves[1].grad, torch.full((6,), -slope / 6))
    assert leaves[2].grad is None and leaves[3].grad is None


@both
def test_a_step_of_descent_raises_accuracy_and_margin(loss) -> None:
    values = draw(2)
    policy = [value.clone().requires_grad_() for value in values[:2]]
    before = loss(*policy, *values[2:], beta=2.0)
    before.loss.backward()
    moved = [(value - 20 * value.grad).detach() for value in policy]
    after = loss(*moved, *values[2:], beta=2.0)
    assert after.loss < before.loss and after.margin > before.margin and after.accuracy > before.accuracy
    better = moved[0] < policy[0] if loss is diffusion_dpo_loss else moved[0] > policy[0]
    assert better.all()


@both
def test_the_preferred_takes_the_place_of_the_other(loss) -> None:
    chosen, rejected, reference_chosen, reference_rejected = draw(3)
    result = loss(chosen, rejected, reference_chosen, reference_rejected, beta=3.0)
    swapped = loss(rejected, chosen, reference_rejected, reference_chosen, beta=3.0)
    assert swapped.margin.item() == pytest.approx(-result.margin.item(), abs=1e-6)
    assert swapped.accuracy.item() == pytest.approx(1 - result.accuracy.item(), abs=1e-6)


@both
def test_huge_margins_stay_finite(loss) -> None:
    result = loss(rows(2.0).requires_grad_(), rows(0.0), rows(0.0), rows(2.0), beta=1e6)
    assert result.loss.isfinite() and result.loss.grad_fn is not None


@both
def test_half_precision_is_computed_in_fp32(loss) -> None:
    values = [value.bfloat16() for value in draw(4)]
    half, full = loss(*values, beta=5000.0), loss(*(value.float() for value in values), beta=5000.0)
    assert half.loss.dtype == torch.float32 and half.loss == full.loss


def test_min_snr_by_hand() -> None:
    snr = rows(0.0, 1.0, 5.0, 20.0)
    torch.testing.assert_close(min_snr_weights(snr, gamma=5.0, prediction="epsilon"), rows(1.0, 1.0, 1.0, 0.25))
    expected = rows(0.0, 0.5, 5 / 6, 5 / 21)
    torch.testing.assert_close(min_snr_weights(snr, gamma=5.0, prediction="v_prediction"), expected)


@both
@pytest.mark.parametrize("argument", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(loss, argument: int, value: float) -> None:
    values = draw(5)
    values[argument][2] = value
    with pytest.raises(ValueError, match=rf"^{NAMES[loss][argument]} holds NaN"):
        loss(*values, beta=1.0)
    loss(*values, beta=1.0, check_finite=False)


@both
def test_wrong_arguments_are_named(loss) -> None:
    values = draw(6)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be a finite number > 0"):
            loss(*values, beta=beta)
    for position, name in enumerate(NAMES[loss][1:], start=1):
        wrong = [value[:3] if place == position else value for place, value in enumerate(values)]
        with pytest.raises(ValueError, match=rf"^{name} must have the shape"):
            loss(*wrong, beta=1.0)
    with pytest.raises(ValueError, match=r"shape \[B\]"):
        loss(*(value[None] for value in values), beta=1.0)


def test_wrong_weights_are_named() -> None:
    values, snr = draw(7), rows(1.0, 2.0)
    with pytest.raises(ValueError, match="weights must have the shape"):
        diffusion_dpo_loss(*values, beta=1.0, weights=torch.ones(2))
    with pytest.raises(ValueError, match="weights must be >= 0"):
        diffusion_dpo_loss(*values, beta=1.0, weights=-torch.ones(6))
    with pytest.raises(ValueError, match="snr must be >= 0"):
        min_snr_weights(-snr, gamma=5.0, prediction="epsilon")
    with pytest.raises(ValueError, match="snr holds NaN"):
        min_snr_weights(snr / 0, gamma=5.0, prediction="epsilon")
    with pytest.raises(ValueError, match="prediction must be one of epsilon, v_prediction"):
        min_snr_weights(snr, gamma=5.0, prediction="sample")
    with pytest.raises(ValueError, match="gamma"):
        min_snr_weights(snr, gamma=0.0, prediction="epsilon")
    with pytest.raises(ValueError, match="snr"):
        min_snr_weights(snr[None], gamma=5.0, prediction="epsilon")
