"""Stochastic denoising steps for rectified flow, their log-probabilities, and where along the path to take them.

Conventions of `flow_matching`: sigma falls from 1 (noise) to 0 (data), v = noise - clean, x0_hat = x - sigma v,
x1_hat = x + (1 - sigma) v, dt = sigma_next - sigma < 0. A step draws x' ~ N(mean, std^2). With the score
-(x - (1 - sigma) x0_hat) / sigma^2 = -x1_hat / sigma, any noise level s has a drift that keeps the ODE's marginals,
v - s^2/2 * score: "flow" and "dance" are this with two choices of s.

Log-probabilities are means over the latent dims of log N(x'; mean, std^2), normaliser included, with the std the step
really has. The mean (not the sum) keeps ratios near 1 whatever the resolution. Keep stored latents in fp32: rounding
x' to bf16 between rollout and replay changes the ratio.

B samples of any latent dimensions, [B, *dims].
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm_training.algorithms._tensors import (
    ValueCheck,
    demand,
    finite,
    mean_per_sample,
    per_sample,
    require_batched,
    require_choice,
    require_positive,
    require_same_shape,
)

Kernel = Literal["ode", "flow", "dance", "cps"]
WindowStrategy = Literal["all", "progressive", "random", "decay"]

_KERNELS = ("ode", "flow", "dance", "cps")
_PURE_NOISE = 1 - 1e-5  # a sigma from here on is 1 up to rounding; sigma / (1 - sigma) would explode on it
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class SDETransition:
    """Distribution of one step: `mean` [B, *dims], and `std` [B, 1, ..., 1], one per sample, zero for "ode"."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class SDEStep:
    """One step taken or replayed, all fp32.

    `next_latents`, `mean` [B, *dims]; `std` [B, 1, ..., 1], including sqrt(-dt); `log_prob` [B] in nats per latent
    dim, None for "ode".
    """

    next_latents: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None


def sde_transition(
    latents: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kernel: Kernel = "ode",
    eta: float = 0.7,
    sigma_max: float | Tensor | None = None,
    check_finite: bool = True,
) -> SDETransition:
    """Mean and std of a step, without drawing it: all that the KL to a reference velocity needs.

    `latents`, `velocity` [B, *dims]; `sigma`, `sigma_next`: a number, [] or [B]. With dt = sigma_next - sigma:

    - "ode": mean x + v dt, std 0.
    - "flow" (Flow-GRPO, arXiv:2505.05470): s = eta sqrt(sigma / (1 - sigma)), in which sigma = 1 is replaced by
      `sigma_max`, the first sigma of the schedule below 1 (1 up to rounding, 1e-5, counts as 1);
      mean x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt; std s sqrt(-dt). Keeps the ODE's
      marginals.
    - "dance" (DanceGRPO, arXiv:2505.07818): mean x + v dt + eta^2 dt (x - (1 - sigma) x0_hat) / (2 sigma^2);
      std eta sqrt(-dt). Keeps the ODE's marginals (with the sign of the score as here).
    - "cps" (Flow-CPS, arXiv:2509.05952): s = sigma_next sin(eta pi / 2), 0 < eta <= 1; mean (1 - sigma_next) x0_hat +
      sqrt(sigma_next^2 - s^2) x1_hat; std s. Keeps the total coefficients of data and noise, so no visible noise is
      left over, but *not* the marginals: samples are less spread than the ODE's.

    Raises ValueError for shapes, eta out of range, and (one device synchronisation, skipped with check_finite=False)
    non-finite input, sigmas that are not 0 <= sigma_next < sigma <= 1, sigma = 1 without sigma_max for "flow", and
    sigma_next = 0 for "cps", where std would be 0: leave the last step out of the SDE window.
    """
    inputs = _prepare(latents, velocity, sigma, sigma_next, sigma_max, kernel, eta)
    if check_finite:
        demand(*_input_checks(inputs, kernel))
    return _transition(inputs, kernel, eta)


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kernel: Kernel = "ode",
    eta: float = 0.7,
    sigma_max: float | Tensor | None = None,
    next_latents: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    check_finite: bool = True,
) -> SDEStep:
    """Take one step of `sde_transition`, or replay it when `next_latents` [B, *dims] is given, with its log-prob.

    Give exactly one of `next_latents`, `noise` (standard normal, [B, *dims]) and `generator` to a stochastic kernel;
    there is no global RNG to fall back on. "ode" draws nothing, ignores all three and has no log_prob. The log-prob is
    that of a fixed x', so its gradient reaches `velocity` through the mean; `next_latents` = mean + std * noise keeps
    the path for backpropagation through the sampler.

    Raises ValueError as `sde_transition` does, and for a wrong shape of, or non-finite, `next_latents` or `noise`.
    """
    inputs = _prepare(latents, velocity, sigma, sigma_next, sigma_max, kernel, eta)
    checks = _input_checks(inputs, kernel) if check_finite else []
    step = _transition(inputs, kernel, eta)
    if kernel == "ode":
        taken, log_prob = step.mean, None
    else:
        taken = _next_latents(step, next_latents, noise, generator)
        # detached: x' - mean of a drawn x' is std * noise, in which the velocity cancels, and the gradient with it
        log_prob = _normal_log_prob(taken.detach(), step.mean, step.std)
    if check_finite:
        given = {} if kernel == "ode" else {"next_latents": next_latents, "noise": noise}
        demand(*checks, *(finite(name, tensor) for name, tensor in given.items() if tensor is not None))
    return SDEStep(taken, step.mean, step.std, log_prob)


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: float | Tensor, *, check_finite: bool = True) -> Tensor:
    """KL between two Gaussians of equal std, mean over latent dims of (mean - other_mean)^2 / (2 std^2), [B].

    `mean`, `other_mean` [B, *dims]; `std` > 0, including sqrt(-dt), as `SDEStep.std`: a number, [], [B] or
    [B, 1, ..., 1]. Per dim, like the log-probs; gradient flows into both means. Flow-GRPO's published code leaves
    sqrt(-dt) out of std: its value is |dt| times this one, and its coefficient 0.04 at 10 steps, where |dt| is 0.1 on
    the average, is 0.004 here. Raises ValueError for shapes, and (one device synchronisation, skipped with
    check_finite=False) non-finite means or a std that is not > 0.
    """
    require_batched("mean", mean)
    require_same_shape("other_mean", other_mean, "mean", mean)
    mean, other_mean = mean.float(), other_mean.float()
    if isinstance(std, Tensor) and std.shape == (mean.shape[0], *([1] * (mean.ndim - 1))):
        std = std.flatten()
    spread = per_sample("std", std, mean)
    if check_finite:
        positive = ValueCheck((torch.isfinite(spread) & (spread > 0)).all(), "std must be finite numbers > 0")
        demand(finite("mean", mean), finite("other_mean", other_mean), positive)
    return mean_per_sample(((mean - other_mean) / spread).square()) / 2


def guard_log_ratio(
    log_probs: Tensor,
    old_log_probs: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: float | Tensor,
    *,
    check_finite: bool = True,
) -> Tensor:
    """GRPO-Guard's normalised log-ratio of a step (arXiv:2510.22319), [B]: (log p - log p_old + KL) * std.

    KL is `gaussian_kl(mean, old_mean, std)`. For the step that was taken, x' = old_mean + std * eps, this is
    mean(eps * (mean - old_mean)): centred on 0 and of the same size at every noise level, where the plain log-ratio
    leans below 0 and grows as 1 / std, so that a clip range means the same at every step. The step's loss is then to be
    divided by |dt|. `log_probs`, `old_log_probs` [B]; `mean`, `old_mean` [B, *dims]; `std` > 0 as in `gaussian_kl`.
    Gradient flows into `log_probs` and `mean`. Raises ValueError as `gaussian_kl` does, and for shapes.
    """
    require_same_shape("old_log_probs", old_log_probs, "log_probs", log_probs)
    if log_probs.shape != mean.shape[:1]:
        raise ValueError(f"log_probs must have shape [{mean.shape[0]}], got {list(log_probs.shape)}")
    if check_finite:
        demand(finite("log_probs", log_probs), finite("old_log_probs", old_log_probs))
    kl = gaussian_kl(mean, old_mean.detach(), std, check_finite=check_finite)
    if isinstance(std, Tensor) and std.ndim > 1:
        std = std.flatten()
    return (log_probs.float() - old_log_probs.detach().float() + kl) * std


def divergence_mask(ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """Flow-DPPO's trust region: False where a sample has left it and its advantage would push it further out, [B] bool.

    Left it: `divergence` (KL to the policy that sampled, `gaussian_kl`) > `threshold`; further out: A > 0 and
    ratio > 1, or A < 0 and ratio < 1. Samples on their way back keep their gradient, unlike under a ratio clip. All
    [B], of the same step; no gradient. Raises ValueError for shapes or a threshold that is not > 0.
    """
    require_same_shape("advantages", advantages, "ratio", ratio)
    require_same_shape("divergence", divergence, "ratio", ratio)
    require_positive("threshold", threshold)
    ratio, advantages, divergence = ratio.detach(), advantages.detach(), divergence.detach()
    outwards = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    return ~(outwards & (divergence > threshold))


def noise_weights(sigmas: Tensor, *, kernel: Kernel, eta: float) -> Tensor:
    """TempFlow-GRPO's weight of each step of a schedule (arXiv:2508.04324): its std over the mean std, fp32 [S].

    `sigmas` [S + 1] fall from at most 1 to 0. A step's std is s sqrt(-dt), the noise it explores with, and the gradient
    of its log-prob goes as 1 / std: so weighted, steps count alike in what they change, and the early ones, which
    decide most, are no longer drowned by the last ones. The mean is over the steps of the schedule that have noise (all
    but the last one of "cps"), whichever of them are trained: a window's place keeps its weight. Raises ValueError for
    the kernel "ode", which has no noise, and as `sde_transition` does.
    """
    require_choice("kernel", kernel, ("flow", "dance", "cps"))
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must have shape [S + 1], got {list(sigmas.shape)}")
    nothing = sigmas.new_zeros(len(sigmas) - 1, 1)
    below_one = sigmas[sigmas < _PURE_NOISE].amax() if bool((sigmas < _PURE_NOISE).any()) else None
    step = sde_transition(
        nothing,
        nothing,
        sigmas[:-1],
        sigmas[1:],
        kernel=kernel,
        eta=eta,
        sigma_max=below_one,
        check_finite=False,
    )
    stds = step.std.flatten()
    return stds / stds[stds > 0].mean()


def sde_window(
    step: int,
    total_steps: int,
    *,
    size: int | None = None,
    strategy: WindowStrategy = "all",
    kernel: Kernel = "flow",
    step_range: tuple[int, int] | None = None,
    stride: int = 1,
    interval: int = 25,
    decay_rate: float = 0.1,
    decay_threshold: int = 13,
    uniform: float | None = None,
) -> tuple[int, ...]:
    """Indices of the denoising steps that are stochastic and trained at training iteration `step` (from 0).

    MixGRPO (arXiv:2507.21802) / Flow-GRPO-Fast: SDE and loss inside the window, ODE outside. Eligible steps are
    `step_range` (half-open, default all `total_steps`); kernel "cps" never includes the last one, whose std is 0.

    - "all": every eligible step, whatever `size` is. The other strategies need `size`.
    - "progressive": `size` consecutive steps, moved towards the data by `stride` every `interval` iterations. The last
      position always ends on the last eligible step; after it the window starts over.
    - "decay": the same, but a window at start l stays round(interval * exp(-decay_rate * max(0, l - decay_threshold)))
      iterations, at least one: early, global steps get the most training.
    - "random": `size` consecutive steps at a start chosen by `uniform` in [0, 1), drawn by the caller.

    Raises ValueError naming the argument that does not fit.
    """
    first, last = _eligible_steps(step, total_steps, kernel, step_range)
    require_choice("strategy", strategy, ("all", "progressive", "random", "decay"))
    if strategy == "all":
        return tuple(range(first, last))
    if size is None or not 1 <= size <= last - first:
        raise ValueError(f"size must lie in [1, {last - first}], the number of eligible steps, got {size}")
    if strategy == "random":
        if uniform is None or not 0 <= uniform < 1:
            raise ValueError(f'uniform in [0, 1) is needed for strategy "random", got {uniform}')
        start = first + int(uniform * (last - first - size + 1))
        return tuple(range(start, start + size))
    if stride < 1 or interval < 1 or decay_rate < 0:
        raise ValueError(
            f"stride and interval must be >= 1 and decay_rate >= 0, got {stride}, {interval} and {decay_rate}"
        )
    starts = [*range(first, last - size, stride), last - size]
    rate = decay_rate if strategy == "decay" else 0.0
    dwells = [max(1, round(interval * math.exp(-rate * max(0, start - decay_threshold)))) for start in starts]
    leaves_at = list(itertools.accumulate(dwells))  # iteration of a round at which each position is left
    start = starts[bisect.bisect_right(leaves_at, step % leaves_at[-1])]
    return tuple(range(start, start + size))


def _require_kernel(kernel: str, eta: float) -> None:
    require_choice("kernel", kernel, _KERNELS)
    if kernel != "ode":
        require_positive("eta", eta)
    if kernel == "cps" and eta > 1:
        raise ValueError(f'eta must lie in (0, 1] for kernel "cps", got {eta}')


@dataclass(frozen=True)
class _StepInputs:
    """fp32: `latents`, `velocity` [B, *dims]; `now`, `after`, `below_one` [B, 1, ..., 1].

    `below_one` is `now` with 1 replaced by sigma_max.
    """

    latents: Tensor
    velocity: Tensor
    now: Tensor
    after: Tensor
    below_one: Tensor


def _prepare(
    latents: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    sigma_max: float | Tensor | None,
    kernel: Kernel,
    eta: float,
) -> _StepInputs:
    """Everything that can be checked without reading a value, and the casts."""
    require_batched("latents", latents)
    require_same_shape("velocity", velocity, "latents", latents)
    _require_kernel(kernel, eta)
    latents, velocity = latents.float(), velocity.float()
    now, after = per_sample("sigma", sigma, latents), per_sample("sigma_next", sigma_next, latents)
    below_one = (
        now if sigma_max is None else torch.where(now < _PURE_NOISE, now, per_sample("sigma_max", sigma_max, latents))
    )
    return _StepInputs(latents, velocity, now, after, below_one)


def _input_checks(inputs: _StepInputs, kernel: Kernel) -> list[ValueCheck]:
    ordered = (inputs.after >= 0) & (inputs.after < inputs.now) & (inputs.now <= 1)
    checks = [
        finite("latents", inputs.latents),
        finite("velocity", inputs.velocity),
        ValueCheck(ordered.all(), "sigma, sigma_next must satisfy 0 <= sigma_next < sigma <= 1"),
    ]
    if kernel == "flow":
        complaint = 'sigma_max must lie in (0, 1) and be given when sigma is 1 with kernel "flow"'
        checks.append(ValueCheck(((inputs.below_one > 0) & (inputs.below_one < _PURE_NOISE)).all(), complaint))
    if kernel == "cps":
        complaint = 'sigma_next is 0, where kernel "cps" has std 0: exclude the last step from the SDE window'
        checks.append(ValueCheck((inputs.after != 0).all(), complaint))
    return checks


def _transition(inputs: _StepInputs, kernel: Kernel, eta: float) -> SDETransition:
    latents, velocity, now, after = inputs.latents, inputs.velocity, inputs.now, inputs.after
    dt = after - now
    if kernel == "ode":
        return SDETransition(latents + velocity * dt, torch.zeros_like(now))
    if kernel == "cps":
        clean, noise = latents - now * velocity, latents + (1 - now) * velocity
        # sqrt(sigma_next^2 - s^2) with s = sigma_next sin(a) is sigma_next cos(a), without the cancellation
        angle = eta * math.pi / 2
        return SDETransition((1 - after) * clean + after * math.cos(angle) * noise, after * math.sin(angle))
    # 1 - sigma_max, not 1 - sigma: at pure noise the latter is 0
    level = torch.full_like(now, eta) if kernel == "dance" else eta * (now / (1 - inputs.below_one)).sqrt()
    correction = level.square() / (2 * now)  # the factor of x1_hat = x + (1 - sigma) v = -sigma * score
    mean = latents * (1 + correction * dt) + velocity * (1 + correction * (1 - now)) * dt
    return SDETransition(mean, level * (-dt).sqrt())


def _next_latents(
    step: SDETransition, next_latents: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """x' in fp32, given or drawn."""
    if sum(given is not None for given in (next_latents, noise, generator)) != 1:
        raise ValueError("next_latents, noise, generator: a stochastic kernel needs exactly one of them")
    if next_latents is not None:
        require_same_shape("next_latents", next_latents, "latents", step.mean)
        return next_latents.float()
    if noise is not None:
        require_same_shape("noise", noise, "latents", step.mean)
        return step.mean + step.std * noise.float()
    assert generator is not None  # exactly one of the three was given
    # on the generator's device: one seed gives other numbers on another device
    drawn = torch.randn(step.mean.shape, generator=generator, device=generator.device)
    return step.mean + step.std * drawn.to(step.mean.device)


def _normal_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B]: mean over dims of log N(value; mean, std^2)."""
    return -mean_per_sample(((value - mean) / std).square()) / 2 - std.flatten().log() - _HALF_LOG_2PI


def _eligible_steps(step: int, total_steps: int, kernel: str, step_range: tuple[int, int] | None) -> tuple[int, int]:
    """Half-open range of steps a window may cover, after checking the counts."""
    require_choice("kernel", kernel, ("flow", "dance", "cps"))
    if step < 0 or total_steps < 1:
        raise ValueError(f"step must be >= 0 and total_steps >= 1, got {step} and {total_steps}")
    first, last = (0, total_steps) if step_range is None else step_range
    if not 0 <= first < last <= total_steps:
        raise ValueError(f"step_range must satisfy 0 <= first < last <= {total_steps}, got {step_range}")
    if kernel == "cps":
        last = min(last, total_steps - 1)
    if first >= last:
        raise ValueError('step_range leaves no step: kernel "cps" excludes the last of total_steps, whose std is 0')
    return first, last
