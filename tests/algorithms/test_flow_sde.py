"""Transitions by hand, log-probs against torch.distributions, replay, and the KL."""

import math

import pytest
import torch

from glm_training.algorithms.flow_sde import (
    gaussian_kl,
    noise_weights,
    sde_step,
    sde_transition,
)

NAN = math.nan
STOCHASTIC = ["flow", "dance", "cps"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


# -- mean and std ------------------------------------------------------------------------------------------------------


def one_number(kernel, sigma: float, sigma_next: float, **options) -> tuple[float, float]:
    x, v = torch.tensor([[1.5]]), torch.tensor([[-0.5]])
    step = sde_transition(x, v, sigma, sigma_next, kernel=kernel, **options)
    return step.mean.item(), step.std.item()


def test_ode_by_hand() -> None:
    assert one_number("ode", 0.8, 0.5) == pytest.approx((1.5 - 0.5 * -0.3, 0.0))


def test_flow_by_hand() -> None:
    mean, std = one_number("flow", 0.8, 0.5, eta=0.7)
    level_squared = 0.49 * 0.8 / 0.2
    expected = 1.5 * (1 + level_squared * -0.3 / 1.6) - 0.5 * (1 + level_squared * 0.2 / 1.6) * -0.3
    assert (mean, std) == pytest.approx((expected, math.sqrt(level_squared * 0.3)), rel=1e-6)


def test_flow_replaces_sigma_one_and_nothing_else_by_sigma_max() -> None:
    mean, std = one_number("flow", 1.0, 0.9, eta=0.7, sigma_max=0.9)
    level_squared = 0.49 * 1.0 / 0.1
    assert (mean, std) == pytest.approx((1.5 * (1 - level_squared * 0.1 / 2) + 0.05, math.sqrt(level_squared * 0.1)))
    for sigma in (0.95, 0.9995):
        assert one_number("flow", sigma, 0.9, sigma_max=0.9) == one_number("flow", sigma, 0.9)
    levels, after = torch.tensor([1.0, 0.95]), torch.tensor([0.9, 0.9])
    x, v = torch.full((2, 1), 1.5), torch.full((2, 1), -0.5)
    both = sde_transition(x, v, levels, after, kernel="flow", sigma_max=0.9)
    assert both.mean[:, 0].tolist() == pytest.approx([mean, one_number("flow", 0.95, 0.9)[0]])


def test_dance_by_hand() -> None:
    mean, std = one_number("dance", 0.8, 0.5, eta=0.3)
    clean = 1.5 + 0.8 * 0.5
    expected = 1.5 + 0.15 + 0.5 * 0.09 * -0.3 * (1.5 - 0.2 * clean) / 0.64
    assert (mean, std) == pytest.approx((expected, 0.3 * math.sqrt(0.3)), rel=1e-6)


def test_cps_by_hand() -> None:
    mean, std = one_number("cps", 0.8, 0.5, eta=0.6)
    clean, noise, level = 1.5 + 0.8 * 0.5, 1.5 - 0.2 * 0.5, 0.5 * math.sin(0.3 * math.pi)
    assert (mean, std) == pytest.approx((0.5 * clean + math.sqrt(0.25 - level**2) * noise, level), rel=1e-6)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_vanishing_noise_gives_the_ode(kernel) -> None:
    x, v = draw(0, 3, 4), draw(1, 3, 4)
    ode = sde_transition(x, v, 0.7, 0.6)
    step = sde_transition(x, v, 0.7, 0.6, kernel=kernel, eta=1e-4)
    torch.testing.assert_close(step.mean, ode.mean, atol=1e-5, rtol=0)
    assert 0 < step.std.max() < 1e-3


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.1])
def test_flow_and_dance_are_one_drift_at_two_noise_levels(sigma: float) -> None:
    x, v = draw(0, 2, 5), draw(1, 2, 5)
    eta = 0.7
    flow = sde_transition(x, v, sigma, sigma - 0.05, kernel="flow", eta=eta)
    dance = sde_transition(x, v, sigma, sigma - 0.05, kernel="dance", eta=eta * math.sqrt(sigma / (1 - sigma)))
    torch.testing.assert_close(dance.mean, flow.mean)
    torch.testing.assert_close(dance.std, flow.std)


def test_flow_treats_a_rounded_one_as_one() -> None:
    rounded = 1 - 2**-24
    expected = one_number("flow", 1.0, 0.9, sigma_max=0.9)
    assert one_number("flow", rounded, 0.9, sigma_max=0.9) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="sigma_max must lie"):
        one_number("flow", rounded, 0.9)


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.9, 1.0])
def test_cps_keeps_the_coefficients_of_data_and_noise(eta: float) -> None:
    # with exact x0 and x1: mean = (1 - s') x0 + c x1, and c^2 + std^2 must be s'^2
    clean, noise = draw(0, 2, 3), draw(1, 2, 3)
    step = sde_transition(0.3 * clean + 0.7 * noise, noise - clean, 0.7, 0.4, kernel="cps", eta=eta)
    coefficient = (step.mean - 0.6 * clean) / noise
    total = coefficient.square() + step.std.square()
    torch.testing.assert_close(total, torch.full((2, 3), 0.16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["ode", *STOCHASTIC])
@pytest.mark.parametrize("shape", [(2, 3), (3, 4, 5, 6)])
def test_sigma_per_sample_equals_one_at_a_time(kernel, shape: tuple[int, ...]) -> None:
    x, v = draw(0, *shape), draw(1, *shape)
    sigma, after = torch.linspace(0.9, 0.5, shape[0]), torch.linspace(0.7, 0.2, shape[0])
    batch = sde_transition(x, v, sigma, after, kernel=kernel)
    assert batch.mean.shape == shape and batch.std.shape == (shape[0], *[1] * (len(shape) - 1))
    for row in range(shape[0]):
        one = slice(row, row + 1)
        for levels in ((sigma[row], after[row]), (sigma[row].item(), after[row].item())):
            single = sde_transition(x[one], v[one], *levels, kernel=kernel)
            torch.testing.assert_close(batch.mean[one], single.mean)
            torch.testing.assert_close(batch.std[one], single.std)


# -- log-prob and replay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", STOCHASTIC)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 4, 5, 6)])
def test_log_prob_is_the_mean_normal_log_prob(kernel, shape: tuple[int, ...]) -> None:
    step = sde_step(draw(0, *shape), draw(1, *shape), 0.6, 0.5, kernel=kernel, generator=generator(2))
    assert step.log_prob is not None and step.log_prob.shape == shape[:1]
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(step.next_latents).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_replay_gives_the_rollouts_log_prob_and_the_right_gradient(kernel) -> None:
    x, v = draw(0, 2, 3, 4), draw(1, 2, 3, 4)
    taken = sde_step(x, v, 0.6, 0.5, kernel=kernel, generator=generator(2))
    velocity = v.clone().requires_grad_()
    replayed = sde_step(x, velocity, 0.6, 0.5, kernel=kernel, next_latents=taken.next_latents)
    assert replayed.log_prob is not None and taken.log_prob is not None
    assert torch.equal(replayed.log_prob, taken.log_prob) and torch.equal(replayed.next_latents, taken.next_latents)
    (slope,) = torch.autograd.grad(replayed.log_prob.sum(), velocity)
    step_size = 1e-2
    ahead = sde_step(x, v + step_size * slope.sign(), 0.6, 0.5, kernel=kernel, next_latents=taken.next_latents)
    assert ahead.log_prob is not None and (ahead.log_prob > taken.log_prob).all()
    slope_of_mean = (sde_transition(x, v + 1.0, 0.6, 0.5, kernel=kernel).mean - taken.mean).mean().item()
    expected = (taken.next_latents - taken.mean) / taken.std.square() * slope_of_mean / 12
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)


def test_sampling_keeps_the_path_through_the_sampler_but_scores_a_fixed_point() -> None:
    velocity = draw(1, 2, 3).requires_grad_()
    step = sde_step(draw(0, 2, 3), velocity, 0.6, 0.5, kernel="flow", noise=draw(2, 2, 3))
    assert step.log_prob is not None
    (through,) = torch.autograd.grad(step.next_latents.sum(), velocity, retain_graph=True)
    (scored,) = torch.autograd.grad(step.log_prob.sum(), velocity)
    assert through.abs().min() > 0 and scored.abs().min() > 0


def test_noise_and_generator_agree_and_draw_what_they_say() -> None:
    x, v = draw(0, 2, 3), draw(1, 2, 3)
    by_generator = sde_step(x, v, 0.6, 0.5, kernel="dance", generator=generator(7))
    by_noise = sde_step(x, v, 0.6, 0.5, kernel="dance", noise=draw(7, 2, 3))
    assert torch.equal(by_generator.next_latents, by_noise.next_latents)
    torch.testing.assert_close(by_noise.next_latents, by_noise.mean + by_noise.std * draw(7, 2, 3))


def test_ode_step_ignores_what_it_does_not_need() -> None:
    x, v = draw(0, 2, 3), draw(1, 2, 3)
    step = sde_step(x, v, 0.6, 0.0, generator=generator(0), next_latents=x)
    assert step.log_prob is None and not step.std.any()
    torch.testing.assert_close(step.next_latents, x - 0.6 * v)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    sde_step(draw(0, 2, 3), draw(1, 2, 3), 0.6, 0.5, kernel="flow", generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_raised() -> None:
    x, v, after = (draw(seed, 2, 3).to(torch.bfloat16) for seed in range(3))
    step = sde_step(x, v, 0.6, 0.5, kernel="flow", next_latents=after)
    expected = sde_step(x.float(), v.float(), 0.6, 0.5, kernel="flow", next_latents=after.float())
    assert step.mean.dtype == torch.float32
    torch.testing.assert_close(step.log_prob, expected.log_prob)


@pytest.mark.parametrize("kernel", ["flow", "dance"])
def test_last_step_is_a_proper_gaussian(kernel) -> None:
    step = sde_step(draw(0, 2, 3), draw(1, 2, 3), 0.1, 0.0, kernel=kernel, generator=generator(0))
    assert step.log_prob is not None and torch.isfinite(step.log_prob).all() and (step.std > 0).all()


# -- KL ----------------------------------------------------------------------------------------------------------------


def test_the_published_kl_is_dt_times_ours() -> None:
    """sigma .8 -> .7, eta .7, velocities 1 apart in every dim, by hand: s^2 = .49 * 4; the means are
    (1 + s^2 .2 / 1.6) .1 = .1245 apart; published .1245^2 / (2 s^2) = .00395414, ours that / .1 (docs/recipes.md)."""
    latents = torch.zeros(1, 6)
    steps = [
        sde_transition(latents, torch.full_like(latents, v), 0.8, 0.7, kernel="flow", eta=0.7, sigma_max=0.9)
        for v in (0.0, 1.0)
    ]
    ours = gaussian_kl(steps[0].mean, steps[1].mean, steps[0].std)
    s2 = 0.49 * 4
    published = (0.1 * (1 + s2 * 0.2 / 1.6)) ** 2 / (2 * s2)
    assert published == pytest.approx(0.00395414, rel=1e-5)
    assert ours.item() == pytest.approx(published / 0.1, rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 3), (3, 4, 5)])
def test_gaussian_kl_is_the_divergence_per_dim(shape: tuple[int, ...]) -> None:
    mean, other = draw(0, *shape), draw(1, *shape)
    std = torch.linspace(0.1, 2, shape[0])
    wide = std.reshape(-1, *[1] * (len(shape) - 1))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, wide), normal(other, wide)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected)
    torch.testing.assert_close(gaussian_kl(mean, other, wide), expected)
    torch.testing.assert_close(gaussian_kl(mean, other, 0.5), gaussian_kl(mean, other, torch.tensor(0.5)))
    assert not gaussian_kl(mean, mean, std).any()


def test_kl_to_a_reference_velocity() -> None:
    # means differ by (v - v_ref) * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
    x, v, reference = draw(0, 2, 3), draw(1, 2, 3).requires_grad_(), draw(2, 2, 3)
    step = sde_step(x, v, 0.6, 0.5, kernel="flow", eta=0.7, generator=generator(0))
    other = sde_transition(x, reference, 0.6, 0.5, kernel="flow", eta=0.7)
    kl = gaussian_kl(step.mean, other.mean, step.std)
    level_squared = 0.49 * 0.6 / 0.4
    factor = (1 + level_squared * 0.4 / 1.2) * 0.1
    expected = ((v - reference).square() * factor**2 / (2 * level_squared * 0.1)).mean(1)
    torch.testing.assert_close(kl, expected)
    kl.sum().backward()
    assert v.grad is not None and torch.equal(v.grad.sign(), (v - reference).sign())


# -- refusals ----------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"latents": torch.zeros(3)}, r"latents .*\[B, \*dims\]"),
        ({"latents": torch.tensor([[0.0, 0.0, 0.0], [0.0, NAN, 0.0]])}, "^latents holds NaN or infinite values$"),
        ({"velocity": torch.zeros(2, 4)}, "velocity must have the shape of latents"),
        ({"velocity": X + math.inf}, "velocity holds NaN or inf"),
        ({"sigma": torch.zeros(3)}, "sigma must be a number"),
        ({"sigma": 0.4}, "sigma_next < sigma"),
        ({"sigma": 1.1}, "sigma <= 1"),
        ({"sigma": NAN}, "sigma_next < sigma"),
        ({"sigma_next": -0.1}, "0 <= sigma_next"),
        ({"sigma_next": torch.tensor([0.5, 0.6])}, "sigma_next < sigma"),
        ({"sigma": 1.0}, "sigma_max must lie"),
        ({"sigma": 1.0, "sigma_max": 1.0}, "sigma_max must lie"),
        ({"kernel": "cps", "sigma_next": 0.0}, "exclude the last step from the SDE window"),
        ({"kernel": "cps", "eta": 1.1}, r"eta must lie in \(0, 1\]"),
        ({"eta": 0.0}, "eta must be"),
        ({"kernel": "dance", "eta": -1.0}, "eta must be"),
        ({"kernel": "sde"}, "kernel must be one of"),
        ({"noise": X}, "next_latents, noise, generator"),
        ({"generator": None}, "next_latents, noise, generator"),
        ({"generator": None, "next_latents": torch.zeros(2, 2)}, "next_latents must have the shape"),
        ({"generator": None, "next_latents": X + NAN}, "next_latents holds NaN"),
        ({"generator": None, "noise": torch.zeros(3, 3)}, "noise must have the shape"),
        ({"generator": None, "noise": X + NAN}, "noise holds NaN"),
    ],
)
def test_step_refuses(change: dict, named: str) -> None:
    arguments = {
        "latents": X,
        "velocity": X,
        "sigma": 0.6,
        "sigma_next": 0.5,
        "kernel": "flow",
        "generator": generator(0),
    } | change
    with pytest.raises(ValueError, match=named):
        sde_step(**arguments)


def test_transition_checks_too_and_both_can_skip() -> None:
    with pytest.raises(ValueError, match="exclude the last step"):
        sde_transition(X, X, 0.5, 0.0, kernel="cps")
    assert torch.isnan(sde_transition(X + NAN, X, 0.6, 0.5, check_finite=False).mean).all()
    step = sde_step(X, X + NAN, 0.6, 0.5, kernel="flow", noise=X, check_finite=False)
    assert step.log_prob is not None and torch.isnan(step.log_prob).all()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((torch.zeros(3), torch.zeros(3), 1.0), "mean"),
        ((X, torch.zeros(2, 2), 1.0), "other_mean must have the shape of mean"),
        ((X, X, 0.0), "std must be"),
        ((X, X, torch.ones(3)), "std must be a number"),
        ((X, X + NAN, 1.0), "other_mean holds NaN"),
    ],
)
def test_kl_refuses(args: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        gaussian_kl(*args)


# -- weights of the steps ----------------------------------------------------------------------------------------------


def test_noise_weights_are_the_stds_over_their_mean() -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    flow = [0.49 * 1.0 / 0.2 * 0.2, 0.49 * 0.8 / 0.2 * 0.3, 0.49 * 0.5 / 0.5 * 0.5]
    dance = [0.2, 0.3, 0.5]
    for kernel, squares in (("flow", flow), ("dance", dance)):
        stds = [math.sqrt(square) for square in squares]
        weights = noise_weights(sigmas, kernel=kernel, eta=0.7)
        assert weights.tolist() == pytest.approx([std / (sum(stds) / 3) for std in stds], rel=1e-5)
    # std sigma_next sin(eta pi / 2): eta has no effect, and the last step, which has no noise, none either
    assert noise_weights(sigmas, kernel="cps", eta=0.4).tolist() == pytest.approx([0.8 / 0.65, 0.5 / 0.65, 0.0])


def test_noise_weights_of_a_schedule_that_starts_below_pure_noise() -> None:
    """Nothing stands in for a sigma of 1 where there is none."""
    weights = noise_weights(torch.tensor([0.8, 0.5, 0.0]), kernel="flow", eta=0.5)
    stds = [math.sqrt(0.8 / 0.2 * 0.3), math.sqrt(0.5 / 0.5 * 0.5)]
    assert weights.tolist() == pytest.approx([std / (sum(stds) / 2) for std in stds], rel=1e-5)


def test_noise_weights_refuse() -> None:
    with pytest.raises(ValueError, match="kernel must be one of flow, dance, cps, got 'ode'"):
        noise_weights(torch.tensor([1.0, 0.0]), kernel="ode", eta=0.5)
    with pytest.raises(ValueError, match=r"sigmas must have shape \[S \+ 1\], got \[1\]"):
        noise_weights(torch.tensor([1.0]), kernel="flow", eta=0.5)
