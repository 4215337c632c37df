"""The clipped policy-gradient loss for tokens of the AR half and for denoising steps of the DiT half.

B sequences of L actions (prior tokens, or SDE steps). A mask [B, L] (bool, or 0/1) says which actions count; whatever
stands at a masked action, NaN included, reaches neither the loss nor the gradient nor a figure. Optional `weights`
[B, L] >= 0 weigh actions against each other (preview tokens against large ones). With w = mask * weights (w = mask
without weights) and x the per-action terms, the aggregations are

- "sequence_mean" (GRPO, arXiv:2402.03300): mean over the B sequences of sum_t(w x) / sum_t(w). A sequence whose w is
  all zero adds 0 and still counts in B.
- "token_mean" (DAPO, arXiv:2503.14476): sum(w x) / sum(w), both over the whole chunk; or sum(w x) /
  `global_token_count`, where the caller passes sum(w) over all chunks and processes of the optimizer step. Chunk losses
  are then to be *added*, and gradients *summed* over processes: under DDP, which averages them, multiply the loss by
  the world size.
- "constant" (Dr.GRPO, arXiv:2503.20783): sum(w x) / (B * constant_length). The normaliser knows neither mask nor
  weights, so weights here also change the loss's size.

The figures for the log are over unmasked actions, without weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm_training.algorithms._tensors import (
    ValueCheck,
    demand,
    finite,
    require_choice,
    require_ndim,
    require_positive,
    require_same_shape,
)

Level = Literal["token", "sequence"]
Objective = Literal["ppo", "cispo"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the rest are detached 0-dim fp32 figures for the log.

    `ratio_mean`; `ratio_max_deviation`, the largest |ratio - 1| (the on-policy gate reads it); `clip_fraction`, the
    share of actions whose gradient (ppo) or weight (cispo) the clip cut; `approx_kl`, the k3 estimate of
    KL(old || new) from token log-ratios, >= 0; `reference_kl`, the k3 estimate of KL(new || reference) before kl_coef,
    None without a reference.
    """

    loss: Tensor
    ratio_mean: Tensor
    ratio_max_deviation: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    reference_kl: Tensor | None


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    level: Level = "token",
    objective: Objective = "ppo",
    aggregation: Aggregation = "sequence_mean",
    constant_length: float | None = None,
    reference_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_weights: Tensor | None = None,
    weights: Tensor | None = None,
    global_token_count: float | Tensor | None = None,
    check_finite: bool = True,
) -> PolicyLoss:
    """Policy loss over `log_probs`, `old_log_probs`, `reference_log_probs`, `mask`, `weights` [B, L], in fp32.

    `advantages` [B] or [B, L]. Ratio r = exp(log_probs - old); level "sequence" (GSPO, arXiv:2507.18071) has every
    action carry exp of its sequence's mean log-ratio over unmasked actions, with the gradient of the action's own
    log-prob (GSPO-token: for [B] advantages and no weights, the same gradient as GSPO). "ppo": -min(r A, clip(r, 1 -
    low, 1 + high) A). "cispo" (arXiv:2506.13585): -sg(min(r, high)) A log_probs; here `high` >= 1 caps the ratio itself
    and `low` is unused. kl_coef * (exp(D) - D - 1), D = reference - log_probs, is added per action, times its
    `kl_weights` [B, L] where they are given. Aggregation: see the module. Gradient flows into `log_probs` alone.

    Raises ValueError for shapes, clip bounds, arguments that do not belong together, and (one device synchronisation,
    skipped with check_finite=False) non-finite values at unmasked actions, negative weights, or nothing unmasked while
    no global_token_count is given.
    """
    low, high = _require_clip(clip, objective)
    if kl_weights is not None:
        require_same_shape("kl_weights", kl_weights, "log_probs", log_probs)
    _require_options(level, aggregation, constant_length, global_token_count)
    if kl_coef != 0:
        require_positive("kl_coef", kl_coef)
        if reference_log_probs is None:
            raise ValueError(f"reference_log_probs is needed for kl_coef = {kl_coef}")
    actions = _gather(log_probs, old_log_probs, advantages, mask, reference_log_probs, weights)
    if check_finite:
        _require_values(actions, needs_token=global_token_count is None)
    log_ratio = actions.log_probs - actions.old_log_probs
    carried = log_ratio if level == "token" else _sequence_log_ratio(log_ratio, actions.keep)
    ratio = carried.exp()
    terms, clipped = _objective_terms(ratio, actions, low, high, objective)
    reference_kl = None
    if actions.reference_log_probs is not None:
        kl = _k3(actions.reference_log_probs - actions.log_probs)
        weighed = kl if kl_weights is None else kl * torch.where(actions.keep, kl_weights.detach().float(), 0.0)
        terms = terms + kl_coef * weighed if kl_coef != 0 else terms
        reference_kl = _figure(kl, actions.keep)
    return PolicyLoss(
        loss=_aggregate(terms, actions.weights, aggregation, constant_length, global_token_count),
        ratio_mean=_figure(ratio, actions.keep),
        ratio_max_deviation=torch.where(actions.keep, ratio.detach() - 1, 0.0).abs().amax(),
        clip_fraction=_figure(clipped.float(), actions.keep),
        approx_kl=_figure(_k3(log_ratio), actions.keep),
        reference_kl=reference_kl,
    )


@dataclass(frozen=True)
class _Actions:
    """Inputs [B, L] in fp32, zero wherever `keep` is False; `weights` is mask * weights. Only `log_probs` has grad."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    keep: Tensor
    weights: Tensor
    reference_log_probs: Tensor | None


def _require_clip(clip: tuple[float, float], objective: str) -> tuple[float, float]:
    require_choice("objective", objective, ("ppo", "cispo"))
    low, high = clip
    if not (math.isfinite(low) and math.isfinite(high) and low >= 0 and high >= 0):
        raise ValueError(f"clip must be two finite numbers (low, high) >= 0, got {clip}")
    if objective == "cispo" and high < 1:
        raise ValueError(f'clip[1] caps the ratio itself under "cispo" and must be >= 1, got {high}')
    return low, high


def _require_options(
    level: str, aggregation: str, constant_length: float | None, global_token_count: float | Tensor | None
) -> None:
    require_choice("level", level, ("token", "sequence"))
    require_choice("aggregation", aggregation, ("sequence_mean", "token_mean", "constant"))
    if (constant_length is not None) != (aggregation == "constant"):
        raise ValueError('constant_length must be given with aggregation "constant", and only there')
    if constant_length is not None:
        require_positive("constant_length", constant_length)
    if global_token_count is None:
        return
    if aggregation != "token_mean":
        raise ValueError(f'global_token_count belongs to aggregation "token_mean", not {aggregation!r}')
    if not isinstance(global_token_count, Tensor):
        require_positive("global_token_count", global_token_count)
    elif global_token_count.numel() != 1:
        raise ValueError(f"global_token_count must be one number, got shape {list(global_token_count.shape)}")


def _gather(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    reference_log_probs: Tensor | None,
    weights: Tensor | None,
) -> _Actions:
    """Check shapes, cast to fp32, cut gradients of all but `log_probs`, and zero what the mask drops."""
    require_ndim("log_probs", log_probs, 2, "[B, L]")
    for name, tensor in (
        ("old_log_probs", old_log_probs),
        ("mask", mask),
        ("reference_log_probs", reference_log_probs),
        ("weights", weights),
    ):
        if tensor is not None:
            require_same_shape(name, tensor, "log_probs", log_probs)
    batch, length = log_probs.shape
    if advantages.shape not in ((batch,), (batch, length)):
        raise ValueError(f"advantages must have shape [{batch}] or [{batch}, {length}], got {list(advantages.shape)}")
    keep = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask.bool()
    spread = advantages.reshape(batch, -1).expand(batch, length)

    def masked(tensor: Tensor) -> Tensor:
        # where, not a product: 0 * NaN is NaN, in the loss and in the gradient
        return torch.where(keep, tensor.float(), 0.0)

    return _Actions(
        log_probs=masked(log_probs),
        old_log_probs=masked(old_log_probs.detach()),
        advantages=masked(spread.detach()),
        keep=keep,
        weights=keep.float() if weights is None else masked(weights.detach()),
        reference_log_probs=None if reference_log_probs is None else masked(reference_log_probs.detach()),
    )


def _require_values(actions: _Actions, *, needs_token: bool) -> None:
    checks = [
        finite("log_probs", actions.log_probs),
        finite("old_log_probs", actions.old_log_probs),
        finite("advantages", actions.advantages),
        finite("weights", actions.weights),
        ValueCheck((actions.weights >= 0).all(), "weights must be >= 0"),
    ]
    if actions.reference_log_probs is not None:
        checks.append(finite("reference_log_probs", actions.reference_log_probs))
    if needs_token:
        checks.append(ValueCheck((actions.weights > 0).any(), "mask and weights leave no action to learn from"))
    demand(*checks)


def _sequence_log_ratio(log_ratio: Tensor, keep: Tensor) -> Tensor:
    """[B, L]: the value of the sequence's mean log-ratio, the gradient of each action's own log-ratio."""
    mean = log_ratio.detach().sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(keep, mean + (log_ratio - log_ratio.detach()), 0.0)


def _objective_terms(
    ratio: Tensor, actions: _Actions, low: float, high: float, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Loss terms [B, L] before aggregation, and a bool tensor of the actions the clip acted on."""
    advantages = actions.advantages
    if objective == "cispo":
        # detached: a truncated weight on grad log pi; with its gradient this would be the unclipped ratio again
        weight = ratio.detach().clamp(max=high)
        return -weight * advantages * actions.log_probs, ratio.detach() > high
    # the minimum leaves the gradient of a clipped ratio alive where the update undoes what went too far
    terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    above = (ratio.detach() > 1 + high) & (advantages > 0)
    below = (ratio.detach() < 1 - low) & (advantages < 0)
    return terms, above | below


def _aggregate(
    terms: Tensor,
    weights: Tensor,
    aggregation: Aggregation,
    constant_length: float | None,
    global_token_count: float | Tensor | None,
) -> Tensor:
    # tiny instead of an epsilon: a sequence without weight gives exactly 0, and no real sum of weights is changed
    smallest = torch.finfo(torch.float32).tiny
    weighted = terms * weights
    if aggregation == "sequence_mean":
        return (weighted.sum(dim=1) / weights.sum(dim=1).clamp(min=smallest)).mean()
    if constant_length is not None:
        return weighted.sum() / (terms.shape[0] * constant_length)
    if global_token_count is None:
        return weighted.sum() / weights.sum().clamp(min=smallest)
    if isinstance(global_token_count, Tensor):
        global_token_count = global_token_count.detach().float().reshape(())
    return weighted.sum() / global_token_count


def _k3(difference: Tensor) -> Tensor:
    """exp(D) - D - 1 >= 0, without cancellation near D = 0 (http://joschu.net/blog/kl-approx.html)."""
    return torch.expm1(difference) - difference


def _figure(values: Tensor, keep: Tensor) -> Tensor:
    """Detached mean over unmasked actions; 0 where there are none."""
    return torch.where(keep, values.detach(), 0.0).sum() / keep.sum().clamp(min=1)
