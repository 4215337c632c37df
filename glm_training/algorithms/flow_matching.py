"""Rectified flow: the straight path from data to noise, its velocity, and the regression on it.

sigma in [0, 1], 0 is data and 1 is noise. x_sigma = (1 - sigma) * clean + sigma * noise; velocity = noise - clean;
clean = x - sigma * velocity; noise = x + (1 - sigma) * velocity. No function draws random numbers.

B samples of any latent dimensions, [B, *dims].

Value checks cost one device synchronisation per call; `check_finite=False` skips them.
"""

from __future__ import annotations

import math
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

TimestepDensity = Literal["uniform", "logit_normal"]
Reduction = Literal["mean", "none"]

_SMALLEST_TAIL = 2.0**-24  # the spacing of fp32 just below 1: the nearest a draw can come to 1


def interpolate(clean: Tensor, noise: Tensor, sigma: float | Tensor, *, check_finite: bool = True) -> Tensor:
    """x_sigma = (1 - sigma) * clean + sigma * noise, fp32 [B, *dims].

    `clean`, `noise` [B, *dims]; `sigma` in [0, 1]: a number, [] or [B]. Raises ValueError for shapes, non-finite input
    or sigma outside [0, 1].
    """
    require_batched("clean", clean)
    require_same_shape("noise", noise, "clean", clean)
    clean, noise = clean.float(), noise.float()
    levels = per_sample("sigma", sigma, clean)
    if check_finite:
        in_range = ((levels >= 0) & (levels <= 1)).all()
        demand(finite("clean", clean), finite("noise", noise), ValueCheck(in_range, "sigma must lie in [0, 1]"))
    return (1 - levels) * clean + levels * noise


def velocity_target(clean: Tensor, noise: Tensor, *, check_finite: bool = True) -> Tensor:
    """d x_sigma / d sigma = noise - clean, fp32 [B, *dims]. Raises ValueError for shapes or non-finite input."""
    require_batched("clean", clean)
    require_same_shape("noise", noise, "clean", clean)
    clean, noise = clean.float(), noise.float()
    if check_finite:
        demand(finite("clean", clean), finite("noise", noise))
    return noise - clean


def shift_sigma(u: Tensor, mu: float | Tensor, *, check_finite: bool = True) -> Tensor:
    """Resolution-dependent shift sigma = mu / (mu + 1/u - 1), fp32, the shape of `u`.

    Computed as mu*u / (mu*u + (1 - u)), which is the same, holds at u = 0, and gives exactly 1 at u = 1 for every mu
    (the first step of a schedule has to be recognisable as pure noise).
    `u` in [0, 1], any shape; `mu` > 0: a number, or a tensor that broadcasts with `u`. (The scheduler's "linear" time
    shift; "exponential" is this with exp(mu).) Raises ValueError for u outside [0, 1] or mu <= 0.
    """
    u = u.float()
    scale: float | Tensor
    if isinstance(mu, Tensor):
        scale = mu.to(u.device, torch.float32)
    else:
        require_positive("mu", mu)
        scale = mu
    if check_finite:
        checks = [ValueCheck(((u >= 0) & (u <= 1)).all(), "u must lie in [0, 1]")]
        if isinstance(scale, Tensor):
            positive = (torch.isfinite(scale) & (scale > 0)).all()
            checks.append(ValueCheck(positive, "mu must be finite numbers > 0"))
        demand(*checks)
    return scale * u / (scale * u + (1 - u))


def sample_timestep_density(
    uniforms: Tensor,
    density: TimestepDensity = "uniform",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    check_finite: bool = True,
) -> Tensor:
    """Turn `uniforms` in [0, 1], any shape, into draws u of a timestep density, fp32, the same shape.

    "uniform": u = uniforms. "logit_normal" (SD3, arXiv:2403.03206, 3.1): u = sigmoid(mean + std * Phi^-1(uniforms)),
    with `uniforms` kept 2^-24 away from 0 and 1 so that u stays finite and inside (0, 1). Monotone in `uniforms`, so
    stratified uniforms stay stratified. Raises ValueError for uniforms outside [0, 1], std <= 0 or an unknown density.
    """
    require_choice("density", density, ("uniform", "logit_normal"))
    require_positive("std", std)
    if not math.isfinite(mean):
        raise ValueError(f"mean must be a finite number, got {mean}")
    uniforms = uniforms.float()
    if check_finite:
        demand(ValueCheck(((uniforms >= 0) & (uniforms <= 1)).all(), "uniforms must lie in [0, 1]"))
    if density == "uniform":
        return uniforms
    # fp32 uniforms do hit 0, where the quantile is -infinity
    inner = uniforms.clamp(_SMALLEST_TAIL, 1 - _SMALLEST_TAIL)
    return torch.sigmoid(mean + std * torch.special.ndtri(inner))


def flow_matching_loss(
    velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    check_finite: bool = True,
) -> Tensor:
    """Mean squared velocity error e_b = mean over dims of (velocity - (noise - clean))^2, in fp32.

    `velocity`, `clean`, `noise` [B, *dims]; `weights` [B] >= 0, a function of each sample's sigma, multiplies e_b and
    is not divided out again (a weighting w(sigma) changes the objective's size as it does in the papers). reduction
    "mean": the 0-dim mean of w_b * e_b over the batch; "none": [B]. Gradient flows into `velocity` alone. Raises
    ValueError for shapes, negative weights or non-finite input.
    """
    require_batched("velocity", velocity)
    require_same_shape("clean", clean, "velocity", velocity)
    require_same_shape("noise", noise, "velocity", velocity)
    require_choice("reduction", reduction, ("mean", "none"))
    if weights is not None and weights.shape != velocity.shape[:1]:
        raise ValueError(f"weights must have shape [{velocity.shape[0]}], got {list(weights.shape)}")
    velocity = velocity.float()
    target = velocity_target(clean.detach(), noise.detach(), check_finite=False)
    if check_finite:
        checks = [finite("velocity", velocity), finite("clean", clean), finite("noise", noise)]
        if weights is not None:
            checks.append(ValueCheck((torch.isfinite(weights) & (weights >= 0)).all(), "weights must be numbers >= 0"))
        demand(*checks)
    errors = mean_per_sample((velocity - target).square())
    if weights is not None:
        errors = errors * weights.detach().float()
    return errors.mean() if reduction == "mean" else errors
