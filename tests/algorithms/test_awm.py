"""Advantage-weighted matching: the surrogate density and the velocity KL against hand-computed values."""

import math

import pytest
import torch

from glm_training.algorithms.awm import matching_log_density, velocity_kl
from glm_training.algorithms.policy_loss import policy_loss


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    clean, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 4.0]])
    velocity = torch.tensor([[0.5, 1.0]])  # errors 1 and -1 against (-0.5, 2)
    assert matching_log_density(velocity, clean, noise).tolist() == [-1.0]
    expected = -2 * 0.5 * (math.sqrt(1.25) - 0.5)
    assert matching_log_density(velocity, clean, noise, huber=0.5).item() == pytest.approx(expected)
    assert velocity_kl(velocity, velocity + 3.0).tolist() == [9.0]


def test_it_is_highest_at_the_target_and_a_wide_huber_is_the_square() -> None:
    clean, noise = draw(0, 3, 4, 5), draw(1, 3, 4, 5)
    target = noise - clean
    assert matching_log_density(target, clean, noise).eq(0).all()
    velocity = target + 0.1 * draw(2, 3, 4, 5)
    square = matching_log_density(velocity, clean, noise)
    assert (square < 0).all()
    torch.testing.assert_close(matching_log_density(velocity, clean, noise, huber=100.0), square, rtol=1e-3, atol=1e-5)


def test_a_policy_step_pulls_good_samples_to_their_target_and_pushes_bad_ones_away() -> None:
    clean, noise = draw(0, 2, 6), draw(1, 2, 6)
    velocity = draw(2, 2, 6).requires_grad_()
    log_density = matching_log_density(velocity, clean, noise)
    loss = policy_loss(log_density[:, None], log_density.detach()[:, None], torch.tensor([1.0, -1.0])).loss
    (step,) = torch.autograd.grad(-loss, velocity)
    towards = (step * (noise - clean - velocity)).sum(1)
    assert towards[0] > 0 > towards[1]
    # d/dv of -mean(e^2) is -2 e / n, times A / B
    torch.testing.assert_close(step[0], -2 * (velocity - (noise - clean))[0].detach() / 6 / 2)


def test_gradient_reaches_the_velocity_alone() -> None:
    tensors = [draw(seed, 2, 3).requires_grad_() for seed in range(3)]
    (matching_log_density(*tensors).sum() + velocity_kl(tensors[0], tensors[1]).sum()).backward()
    assert tensors[0].grad is not None and tensors[1].grad is None and tensors[2].grad is None


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: matching_log_density(draw(0, 2, 3), draw(0, 2, 4), draw(0, 2, 3)), "clean"),
        (lambda: matching_log_density(draw(0, 2, 3), draw(0, 2, 3), draw(0, 3)), "noise"),
        (lambda: matching_log_density(draw(0, 2, 3), draw(0, 2, 3), draw(0, 2, 3), huber=0.0), "huber"),
        (lambda: matching_log_density(draw(0, 2, 3) * math.nan, draw(0, 2, 3), draw(0, 2, 3)), "velocity"),
        (lambda: velocity_kl(draw(0, 2, 3), draw(0, 2, 4)), "reference_velocity"),
    ],
)
def test_refuses(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
