"""Hinge losses and LeCam's penalty on numbers by hand, their gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from glm_training.algorithms.adversarial import (
    hinge_discriminator_loss,
    hinge_generator_loss,
    lecam_penalty,
    update_averages,
)


def test_discriminator_by_hand() -> None:
    # real: relu(1 - r) = 0, .5, 3; fake: relu(1 + f) = 0, 3
    real = torch.tensor([2.0, 0.5, -2.0], requires_grad=True)
    fake = torch.tensor([[-3.0], [2.0]], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx((3.5 / 3 + 3 / 2) / 2, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(real.grad, torch.tensor([0.0, -1.0, -1.0]) / 6)
    torch.testing.assert_close(fake.grad, torch.tensor([[0.0], [1.0]]) / 4)


def test_generator_by_hand() -> None:
    fake = torch.tensor([[-3.0, 2.0], [2.0, 5.0]], requires_grad=True)
    loss = hinge_generator_loss(fake)
    assert loss.item() == -1.5
    loss.backward()
    assert fake.grad.tolist() == [[-0.25, -0.25]] * 2


def test_lecam_by_hand() -> None:
    """(0.5 + 0.25)^2 + (1 - -2)^2, with slopes 2 * 0.75 and -2 * 3; nothing where the order is the other way round."""
    real, fake = torch.tensor(0.5, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    loss = lecam_penalty(real, fake, torch.tensor([1.0, -0.25]))
    assert loss.item() == 0.5625 + 9
    loss.backward()
    assert (real.grad.item(), fake.grad.item()) == (1.5, -6.0)
    assert lecam_penalty(torch.tensor(-1.0), torch.tensor(3.0), torch.tensor([2.0, 0.0])) == 0


def test_averages_by_hand() -> None:
    averages = torch.zeros(2)
    for _ in range(3):
        averages = update_averages(averages, torch.tensor(2.0), torch.tensor(-1.0, requires_grad=True), 0.5)
    assert averages.tolist() == [1.75, -0.875] and not averages.requires_grad
    moved = update_averages(torch.tensor([1.0, -1.0]), torch.tensor(2.0), torch.tensor(2.0))
    torch.testing.assert_close(moved, torch.tensor([1.001, -0.997]))


def test_losses_are_fp32() -> None:
    logits = torch.tensor([0.3, 0.4], dtype=torch.bfloat16)
    mean = logits.mean()
    losses = hinge_discriminator_loss(logits, logits), hinge_generator_loss(logits)
    averages = update_averages(torch.zeros(2), mean, mean)
    assert {loss.dtype for loss in (*losses, averages, lecam_penalty(mean, mean, averages))} == {torch.float32}
    assert averages[0].item() == pytest.approx(0.001 * mean.item(), rel=1e-6)


def test_wrong_arguments_are_named() -> None:
    good, bad, empty = torch.ones(2), torch.tensor([1.0, math.nan]), torch.ones(0)
    with pytest.raises(ValueError, match="fake_logits holds NaN"):
        hinge_discriminator_loss(good, bad)
    with pytest.raises(ValueError, match="real_logits must not be empty"):
        hinge_discriminator_loss(empty, good)
    with pytest.raises(ValueError, match="fake_logits holds NaN"):
        hinge_generator_loss(bad)
    with pytest.raises(ValueError, match="must be 0-dim"):
        lecam_penalty(good, good[0], good)
    with pytest.raises(ValueError, match="averages holds NaN"):
        lecam_penalty(good[0], good[0], bad)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        update_averages(good, good[0], good[0], 1.0)
    assert math.isnan(hinge_generator_loss(bad, check_finite=False))
