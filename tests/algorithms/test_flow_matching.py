"""The straight path, the shift, the timestep densities and the regression loss."""

import math

import pytest
import torch

from glm_training.algorithms.flow_matching import (
    flow_matching_loss,
    interpolate,
    sample_timestep_density,
    shift_sigma,
    velocity_target,
)

NAN = math.nan


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 2), (2, 4, 6, 5), (1, 1, 1, 1, 1)])
def test_path_and_velocity_are_consistent(shape: tuple[int, ...]) -> None:
    clean, noise = draw(0, *shape), draw(1, *shape)
    sigma = torch.linspace(0.1, 0.9, shape[0])
    level = sigma.reshape(-1, *[1] * (len(shape) - 1))
    noisy, velocity = interpolate(clean, noise, sigma), velocity_target(clean, noise)
    torch.testing.assert_close(noisy - level * velocity, clean)
    torch.testing.assert_close(noisy + (1 - level) * velocity, noise)
    step = interpolate(clean, noise, sigma + 0.05)
    torch.testing.assert_close(step, noisy + 0.05 * velocity)


def test_path_ends_and_sigma_forms() -> None:
    clean, noise = draw(0, 2, 3), draw(1, 2, 3)
    assert torch.equal(interpolate(clean, noise, 0.0), clean) and torch.equal(interpolate(clean, noise, 1.0), noise)
    by_number = interpolate(clean, noise, 0.25)
    torch.testing.assert_close(by_number, 0.75 * clean + 0.25 * noise)
    assert torch.equal(interpolate(clean, noise, torch.tensor(0.25)), by_number)
    assert torch.equal(interpolate(clean, noise, torch.tensor([0.25, 0.25])), by_number)
    assert interpolate(clean.half(), noise.bfloat16(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("mu", [0.25, 1.0, 1.75, 3.25])
def test_shift_is_the_published_formula_and_keeps_the_ends(mu: float) -> None:
    u = torch.linspace(0.001, 1, 50)
    torch.testing.assert_close(shift_sigma(u, mu), mu / (mu + 1 / u - 1))
    torch.testing.assert_close(shift_sigma(u, torch.tensor(mu)), shift_sigma(u, mu))
    assert shift_sigma(torch.tensor([0.0, 1.0]), mu).tolist() == [0.0, 1.0]
    torch.testing.assert_close(shift_sigma(shift_sigma(u, mu), 1 / mu), u, msg="1/mu must undo mu")


def test_shift_of_pure_noise_is_exactly_one() -> None:
    mu = 0.2 + 4 * torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shift_sigma(torch.ones(2000), mu), torch.ones(2000))


def test_shift_takes_a_mu_per_sample() -> None:
    u, mu = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(shift_sigma(u, mu), torch.tensor([0.5, 0.75]))


def test_densities() -> None:
    uniforms = torch.linspace(0.001, 0.999, 999)
    assert torch.equal(sample_timestep_density(uniforms), uniforms)
    for mean, std in ((0.0, 1.0), (-0.5, 0.7)):
        u = sample_timestep_density(uniforms, "logit_normal", mean=mean, std=std)
        expected = torch.distributions.Normal(mean, std).icdf(uniforms)
        torch.testing.assert_close(torch.logit(u), expected, atol=2e-4, rtol=1e-4)
    assert sample_timestep_density(torch.tensor([0.5]), "logit_normal").item() == pytest.approx(0.5)


def test_logit_normal_stays_inside_at_the_edges_of_the_uniforms() -> None:
    u = sample_timestep_density(torch.tensor([0.0, 1e-30, 1.0]), "logit_normal")
    assert torch.isfinite(u).all() and (u > 0).all() and (u < 1).all()


def test_loss_by_hand() -> None:
    velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    clean, noise = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    # targets [0, 1] and [1, 3]; squared errors 1 1 and 1 9
    assert flow_matching_loss(velocity, clean, noise, reduction="none").tolist() == [1.0, 5.0]
    assert flow_matching_loss(velocity, clean, noise).item() == 3.0
    weights = torch.tensor([2.0, 0.5])
    assert flow_matching_loss(velocity, clean, noise, weights=weights).item() == pytest.approx((2 + 2.5) / 2)
    assert flow_matching_loss(velocity, clean, noise, weights=weights, reduction="none").tolist() == [2.0, 2.5]


@pytest.mark.parametrize("shape", [(2, 3), (3, 4, 2, 2)])
def test_loss_is_zero_at_the_target_and_its_gradient_points_there(shape: tuple[int, ...]) -> None:
    clean, noise = draw(0, *shape), draw(1, *shape)
    target = velocity_target(clean, noise)
    assert flow_matching_loss(target, clean, noise).item() == 0
    velocity = draw(2, *shape).requires_grad_()
    (slope,) = torch.autograd.grad(flow_matching_loss(velocity, clean, noise), velocity)
    torch.testing.assert_close(slope, 2 * (velocity.detach() - target) / velocity.numel())


def test_loss_moves_only_the_velocity() -> None:
    leaves = [draw(seed, 2, 3).to(torch.bfloat16).requires_grad_() for seed in range(3)]
    loss = flow_matching_loss(*leaves)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False]


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: interpolate(torch.zeros(3), torch.zeros(3), 0.5), r"clean .*\[B, \*dims\]"),
        (lambda: interpolate(GOOD, torch.zeros(3, 2), 0.5), "noise must have the shape of clean"),
        (lambda: interpolate(GOOD, GOOD + NAN, 0.5), "noise holds NaN"),
        (lambda: interpolate(GOOD, GOOD, 1.5), "sigma must lie in"),
        (lambda: interpolate(GOOD, GOOD, torch.tensor([0.5, NAN])), "sigma must lie in"),
        (lambda: interpolate(GOOD, GOOD, torch.zeros(3)), r"sigma must be a number .*\[2\]"),
        (lambda: velocity_target(GOOD + math.inf, GOOD), "clean holds NaN or inf"),
        (lambda: velocity_target(GOOD, torch.zeros(2, 4)), "noise must have the shape"),
        (lambda: shift_sigma(torch.tensor([1.1]), 2.0), "u must lie in"),
        (lambda: shift_sigma(torch.tensor([0.5]), 0.0), "mu must be"),
        (lambda: shift_sigma(torch.tensor([0.5]), torch.tensor([-1.0])), "mu must be"),
        (lambda: sample_timestep_density(torch.tensor([-0.1])), "uniforms must lie in"),
        (lambda: sample_timestep_density(torch.tensor([NAN]), "logit_normal"), "uniforms must lie in"),
        (lambda: sample_timestep_density(torch.tensor([0.5]), "beta"), "density must be one of"),  # type: ignore[arg-type]
        (lambda: sample_timestep_density(torch.tensor([0.5]), "logit_normal", std=0.0), "std must be"),
        (lambda: flow_matching_loss(GOOD + NAN, GOOD, GOOD), "velocity holds NaN"),
        (lambda: flow_matching_loss(GOOD, torch.zeros(1, 3), GOOD), "clean must have the shape of velocity"),
        (lambda: flow_matching_loss(GOOD, GOOD, GOOD, weights=torch.ones(3)), r"weights must have shape \[2\]"),
        (lambda: flow_matching_loss(GOOD, GOOD, GOOD, weights=-torch.ones(2)), "weights must be numbers >= 0"),
        (lambda: flow_matching_loss(GOOD, GOOD, GOOD, reduction="sum"), "reduction must be one of"),  # type: ignore[arg-type]
    ],
)
def test_refuses(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
