"""Advantage-weighted matching (AWM, arXiv:2509.25050): policy gradient with the matching loss as the log-density.

No trajectory: a drawn clean sample x0 is noised to x_t = (1 - t) x0 + t eps and its log-density is stood in for by
minus the flow-matching error at (t, eps). The ratio of two policies at the same (t, eps) then goes through
`policy_loss` as a denoising step's does. Because the surrogate is a mean over latent dims, ratios stay near 1 and clip
ranges are of the order of the error's change per update, not of 0.2.

B samples of any latent dimensions, [B, *dims].
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm_training.algorithms._tensors import (
    ValueCheck,
    demand,
    finite,
    mean_per_sample,
    require_batched,
    require_positive,
    require_same_shape,
)


def matching_log_density(
    velocity: Tensor, clean: Tensor, noise: Tensor, *, huber: float | None = None, check_finite: bool = True
) -> Tensor:
    """Minus the matching error per latent dim, [B]: -mean((v - (noise - clean))^2), fp32.

    `velocity`, `clean`, `noise` [B, *dims]. `huber` = c > 0 puts 2 c (sqrt(e^2 + c^2) - c) in place of e^2, which
    agrees with it for |e| << c and grows like 2 c |e| beyond. Gradient flows into `velocity` alone. Raises ValueError
    for shapes, c <= 0, and (one device synchronisation, skipped with check_finite=False) non-finite input.
    """
    require_batched("velocity", velocity)
    require_same_shape("clean", clean, "velocity", velocity)
    require_same_shape("noise", noise, "velocity", velocity)
    if check_finite:
        demand(finite("velocity", velocity), finite("clean", clean), finite("noise", noise))
    error = velocity.float() - (noise.detach().float() - clean.detach().float())
    if huber is None:
        return -mean_per_sample(error.square())
    require_positive("huber", huber)
    square = error.square()  # sqrt(e^2 + c^2) - c without cancellation
    return -mean_per_sample(2 * huber * square / (torch.sqrt(square + huber**2) + huber))


def velocity_kl(velocity: Tensor, reference_velocity: Tensor, *, check_finite: bool = True) -> Tensor:
    """The KL's stand-in in velocity space, [B]: mean((v - v_ref)^2) over latent dims, gradient into `velocity` alone.

    Both [B, *dims]. Raises ValueError for shapes and (one device synchronisation, skipped with check_finite=False)
    non-finite input.
    """
    require_batched("velocity", velocity)
    require_same_shape("reference_velocity", reference_velocity, "velocity", velocity)
    if check_finite:
        numbers: list[ValueCheck] = [finite("velocity", velocity), finite("reference_velocity", reference_velocity)]
        demand(*numbers)
    return mean_per_sample((velocity.float() - reference_velocity.detach().float()).square())
