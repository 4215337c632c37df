"""DiffusionNFT (arXiv:2509.16117): reinforcement on the forward process, with no trajectory and any sampler.

A clean sample x0 with advantage A is noised to x_t = (1 - t) x0 + t eps. The trained velocity v and the frozen velocity
v_old of the policy that drew x0 define two implicit policies, v+ = beta v + (1 - beta) v_old and
v- = (1 + beta) v_old - beta v. The positive one is regressed on x0 with weight r, the negative one with weight 1 - r.

At v = v_old both branches predict the same and the gradient of the loss with respect to v is
-2 t A (x0_hat - x0) / (n mean|x0_hat - x0| B): exactly proportional to the clipped advantage, whatever beta and
advantage_max are. beta only sets how far v may go before the branches part.

B samples of any latent dimensions, [B, *dims].
"""

from __future__ import annotations

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

DecaySchedule = Literal["none", "ramp", "late_ramp"]

_SMALLEST_WEIGHT = 1e-5


@dataclass(frozen=True)
class NFTLoss:
    """`loss` carries the gradient; the rest are detached 0-dim fp32 figures for the log.

    `positive_loss`, `negative_loss`: the two branches' normalised errors, averaged over the batch before weighting by
    r. `kl`: mean((v - v_ref)^2), None without a reference. `old_deviation`: mean((v - v_old)^2), 0 right after the old
    policy was copied from the trained one.
    """

    loss: Tensor
    positive_loss: Tensor
    negative_loss: Tensor
    kl: Tensor | None
    old_deviation: Tensor


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noisy: Tensor,
    clean: Tensor,
    sigma: float | Tensor,
    advantages: Tensor,
    *,
    beta: float,
    advantage_max: float,
    reference_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
    check_finite: bool = True,
) -> NFTLoss:
    """advantage_max * mean_b(r l+ + (1 - r) l-) / beta + kl_coef * mean((v - v_ref)^2).

    `velocity`, `old_velocity`, `noisy`, `clean`, `reference_velocity` [B, *dims]; `sigma` in (0, 1], the level of
    `noisy`: a number, [] or [B]; `advantages` [B]. r = clip(A / (2 advantage_max) + 1/2, 0, 1);
    x0_hat+- = noisy - sigma * v+-; l+- = mean (x0_hat+- - clean)^2 / sg(max(mean |x0_hat+- - clean|, 1e-5)).
    Gradient flows into `velocity` alone; everything is computed in fp32. Raises ValueError for shapes, beta or
    advantage_max <= 0, kl_coef < 0 or without a reference, and (one device synchronisation, skipped with
    check_finite=False) for non-finite input or sigma outside (0, 1].
    """
    _require_options(beta, advantage_max, kl_coef, reference_velocity)
    fixed = {"old_velocity": old_velocity, "noisy": noisy, "clean": clean}
    if reference_velocity is not None:
        fixed["reference_velocity"] = reference_velocity
    _require_shapes(velocity, fixed, advantages)
    fixed = {name: tensor.detach().float() for name, tensor in fixed.items()}
    velocity, advantages = velocity.float(), advantages.detach().float()
    level = per_sample("sigma", sigma, velocity)
    if check_finite:
        in_range = ValueCheck(((level > 0) & (level <= 1)).all(), "sigma must lie in (0, 1]")
        numbers = [finite(name, tensor) for name, tensor in fixed.items()]
        demand(finite("velocity", velocity), finite("advantages", advantages), in_range, *numbers)

    # both branches share one offset, so at v = v_old they agree to the last bit and only the advantage decides
    offset = beta * (velocity - fixed["old_velocity"])
    positive = _branch_loss(fixed["old_velocity"] + offset, fixed["noisy"], fixed["clean"], level)
    negative = _branch_loss(fixed["old_velocity"] - offset, fixed["noisy"], fixed["clean"], level)
    share = (advantages / (2 * advantage_max) + 0.5).clamp(0, 1)
    loss = advantage_max / beta * (share * positive + (1 - share) * negative).mean()
    kl = None
    if reference_velocity is not None:
        kl = (velocity - fixed["reference_velocity"]).square().mean()
        loss = loss + kl_coef * kl
    return NFTLoss(
        loss=loss,
        positive_loss=positive.detach().mean(),
        negative_loss=negative.detach().mean(),
        kl=None if kl is None else kl.detach(),
        old_deviation=(velocity.detach() - fixed["old_velocity"]).square().mean(),
    )


def old_policy_decay(step: int, schedule: DecaySchedule) -> float:
    """The decay d of old <- d * old + (1 - d) * trained after optimizer iteration `step` (counted from 0), in [0, 1).

    "none": 0, the old policy is always the trained one (published decay type 0). "ramp": min(0.001 step, 0.5) (type 1,
    used with beta 1). "late_ramp": 0 up to step 75, then 0.0075 more per step up to 0.999 (type 2, used with beta 0.1).
    Raises ValueError for a negative step or an unknown schedule.
    """
    require_choice("schedule", schedule, ("none", "ramp", "late_ramp"))
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    if schedule == "none":
        return 0.0
    if schedule == "ramp":
        return min(0.001 * step, 0.5)
    return min(0.0075 * max(step - 75, 0), 0.999)


def _require_options(beta: float, advantage_max: float, kl_coef: float, reference_velocity: Tensor | None) -> None:
    require_positive("beta", beta)
    require_positive("advantage_max", advantage_max)
    if kl_coef == 0:
        return
    require_positive("kl_coef", kl_coef)
    if reference_velocity is None:
        raise ValueError(f"reference_velocity is needed for kl_coef = {kl_coef}")


def _require_shapes(velocity: Tensor, others: dict[str, Tensor], advantages: Tensor) -> None:
    require_batched("velocity", velocity)
    for name, tensor in others.items():
        require_same_shape(name, tensor, "velocity", velocity)
    if advantages.shape != velocity.shape[:1]:
        raise ValueError(f"advantages must have shape [{velocity.shape[0]}], got {list(advantages.shape)}")


def _branch_loss(velocity: Tensor, noisy: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """[B]: squared error of the clean prediction, divided by its own mean absolute error without gradient."""
    error = noisy - sigma * velocity - clean
    # without gradient: the size only makes levels of noise comparable, it is not to be learned
    with torch.no_grad():
        size = mean_per_sample(error.abs()).clamp(min=_SMALLEST_WEIGHT)
    return mean_per_sample(error.square()) / size
