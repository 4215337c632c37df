"""Where the kernels end when the velocity is exact: 1-D Gaussian data N(1.5, 0.5^2), 100 steps from pure noise.

Every step is affine in x, so mean and variance can be carried through in closed form; drawing samples must agree.
"""

import math

import pytest
import torch

from glm_training.algorithms.flow_sde import sde_step, sde_transition

DATA_MEAN, DATA_STD = 1.5, 0.5


def exact_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise - clean | x] for x = (1 - sigma) clean + sigma noise."""
    variance = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
    deviation = (x - (1 - sigma) * DATA_MEAN) / variance
    return sigma * deviation - (DATA_MEAN + (1 - sigma) * DATA_STD**2 * deviation)


def grid(steps: int) -> list[float]:
    return torch.linspace(1, 0, steps + 1).tolist()


def final_moments(kernel, eta: float, *, steps: int = 100, flip_score: bool = False) -> tuple[float, float]:
    """Mean and std at sigma = 0, in closed form. `flip_score` turns the sign of what the kernel adds to the ODE."""
    sigmas = grid(steps)
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]])
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        velocity = exact_velocity(probe, sigma)
        used = "ode" if kernel == "cps" and after == 0 else kernel
        step = sde_transition(probe, velocity, sigma, after, kernel=used, eta=eta, sigma_max=sigmas[1])
        at_zero, at_one = step.mean[:, 0].tolist()
        if flip_score:
            ode = sde_transition(probe, velocity, sigma, after).mean[:, 0].tolist()
            at_zero, at_one = 2 * ode[0] - at_zero, 2 * ode[1] - at_one
        slope = at_one - at_zero
        mean, variance = slope * mean + at_zero, slope**2 * variance + step.std[0, 0].item() ** 2
    return mean, math.sqrt(variance)


def sampled_std(kernel, eta: float) -> float:
    generator = torch.Generator().manual_seed(0)
    sigmas = grid(100)
    x = torch.randn(1, 60_000, generator=generator)
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        used = "ode" if kernel == "cps" and after == 0 else kernel
        velocity = exact_velocity(x, sigma)
        x = sde_step(
            x, velocity, sigma, after, kernel=used, eta=eta, sigma_max=sigmas[1], generator=generator
        ).next_latents
    return x.std().item()


@pytest.mark.parametrize(
    ("kernel", "eta", "std"), [("ode", 0.7, 0.492), ("flow", 0.7, 0.501), ("dance", 0.3, 0.494), ("cps", 0.7, 0.417)]
)
def test_final_std(kernel, eta: float, std: float) -> None:
    mean, found = final_moments(kernel, eta)
    assert mean == pytest.approx(DATA_MEAN, abs=1e-4)
    assert found == pytest.approx(std, abs=1e-3)
    assert sampled_std(kernel, eta) == pytest.approx(found, abs=6e-3)


def test_a_flipped_score_is_seen() -> None:
    assert final_moments("dance", 0.3, flip_score=True)[1] == pytest.approx(0.634, abs=1e-3)
    assert final_moments("flow", 0.7, flip_score=True)[1] > 1


@pytest.mark.parametrize(("kernel", "eta"), [("ode", 0.7), ("flow", 0.7), ("dance", 0.3), ("dance", 0.6)])
def test_finer_grids_approach_the_data(kernel, eta: float) -> None:
    assert final_moments(kernel, eta, steps=800)[1] == pytest.approx(DATA_STD, abs=2e-3)


def test_cps_does_not_approach_the_data() -> None:
    assert final_moments("cps", 0.7, steps=800)[1] < 0.43


@pytest.mark.parametrize("eta", [0.2, 0.4, 0.8])
def test_more_cps_noise_means_less_spread(eta: float) -> None:
    assert final_moments("cps", eta)[1] < final_moments("cps", eta / 2)[1] < final_moments("ode", 0.7)[1]
