"""From rewards to advantages: group statistics, several rewards at once, and the plan/render credit tree.

P prompts, G samples per prompt, N plans (AR samples) per prompt, M renders (DiT samples) per plan, K metrics.
All statistics are fp32, on the device of the rewards, and carry no gradient. Standard deviations are sample standard
deviations (divided by n - 1). To take statistics over all processes, gather the rewards first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm_training.algorithms._tensors import demand, finite, require_choice, require_ndim, require_same_shape

Scale = Literal["group", "batch", "none"]
CombineMethod = Literal["sum", "gdpo"]

_SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class PlanRenderAdvantages:
    """Advantages of a two-level tree.

    `plan` [P, N]: the plan against the other plans of its prompt. `render` [P, N, M]: the render against its siblings
    of the same plan. `plan_variance_share`: 0-dim, in [0, 1], or NaN where it cannot be identified.
    """

    plan: Tensor
    render: Tensor
    plan_variance_share: Tensor


def group_advantages(rewards: Tensor, *, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """(r - group mean) / (std + eps), fp32 [P, G] from `rewards` [P, G].

    `scale` picks the std: "group", that of the prompt's own group (GRPO, arXiv:2402.03300); "batch", that of all P*G
    rewards (global std, Flow-GRPO, arXiv:2505.05470); "none", divide by 1 and ignore `eps` (Dr.GRPO,
    arXiv:2503.20783). A group whose rewards are all equal gets exact zeros: rounding of the mean is not turned into an
    advantage.

    Raises ValueError for a wrong shape, G = 1 (nothing to compare with), eps < 0 or non-finite rewards.
    """
    require_ndim("rewards", rewards, 2, "[P, G]")
    _require_scale(scale, eps)
    if rewards.shape[1] == 1:
        raise ValueError("rewards has groups of one sample: an advantage needs at least 2 samples per prompt")
    rewards = rewards.detach().float()
    demand(finite("rewards", rewards))
    return _normalise_groups(rewards, torch.ones_like(rewards, dtype=torch.bool), scale, eps)


def combine_rewards(
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    method: CombineMethod = "sum",
    eps: float = 1e-4,
) -> Tensor:
    """One fp32 tensor [P, G] from `components`, each [P, G]; NaN marks a metric that does not apply to a sample.

    "sum": sum_k w_k r_k of the raw rewards. Where metrics are missing, the weights of those that apply are scaled up to
    the same total, r = (sum |w|) / (sum |w| of those that apply) * sum of w_k r_k over those that apply.

    "gdpo" (arXiv:2601.05242): each metric is group-normalised by itself, the results are weighted and summed, and the
    sum is divided by its std over the batch plus `eps`. An inapplicable entry is left out of its group's statistics and
    contributes 0; so does a metric that applies to fewer than two samples of the group. The paper's batch mean is zero
    by construction (every normalised group sums to zero) and is not subtracted, which keeps a group without any spread
    at exact zeros. The result already is an advantage: do not group-normalise it again.

    Raises ValueError naming the metric or the samples: keys of the two mappings differ, shapes differ, infinite values
    or weights, all weights zero, a sample no weighted metric applies to, G = 1 with "gdpo".
    """
    names = _component_names(components, weights)
    require_choice("method", method, ("sum", "gdpo"))
    rewards = torch.stack([components[name].detach().float() for name in names])  # [K, P, G]
    applies = ~torch.isnan(rewards)
    weight = torch.tensor([weights[name] for name in names], device=rewards.device).float()[:, None, None]
    _require_scorable(names, rewards, applies & (weight != 0))
    filled = torch.where(applies, rewards, 0.0)
    if method == "sum":
        present = (weight.abs() * applies).sum(dim=0)
        return weight.abs().sum() / present * (weight * filled).sum(dim=0)
    _require_scale("group", eps)
    if rewards.shape[2] == 1:
        raise ValueError('components has groups of one sample: method "gdpo" needs at least 2 samples per prompt')
    return _gdpo(filled, applies, weight, eps)


def plan_render_advantages(
    rewards: Tensor,
    *,
    scale: Scale = "group",
    eps: float = 1e-4,
    scored: Tensor | None = None,
    across_plans: bool = False,
) -> PlanRenderAdvantages:
    """Credit for a hybrid model from `rewards` [P, N, M]: N plans per prompt, M renders per plan.

    A plan's reward is the mean over its renders and is compared with the other plans of the prompt; a render is
    compared with the renders of the same plan only, or with all of the prompt where the plan is told to have no say in
    what is rewarded (`across_plans`). `scale` and `eps` act as in `group_advantages`, once at the plan level (groups of
    N means) and once at the render level (groups of M rewards, or N * M). A level with one member per group has nothing
    to compare and gets zeros.

    `scored` [P, N, M] bool is False where a render has no reward: what stands there is not looked at. Such a render is
    left out of all statistics and gets exactly zero, and so does a plan without any scored render.

    `plan_variance_share` is the intraclass correlation of the one-way ANOVA pooled over prompts: with
    MS_between = M * sum (plan mean - prompt mean)^2 / (P (N - 1)) and
    MS_within = sum (r - plan mean)^2 / (P N (M - 1)),
    var_plan = max(0, (MS_between - MS_within) / M) (the mean of M renders carries MS_within / M of render noise), and
    the share is var_plan / (var_plan + MS_within). It is NaN when N = 1 (the plan part cannot be identified), when
    M = 1 (the render part cannot), and when no prompt has any spread (there is nothing to share). Prompts with an
    unscored render are left out of it.

    Raises ValueError for a wrong shape, N = M = 1, or non-finite rewards.
    """
    require_ndim("rewards", rewards, 3, "[P, N, M]")
    _require_scale(scale, eps)
    _, plans, renders = rewards.shape
    if plans == 1 and renders == 1:
        raise ValueError("rewards has one plan and one render per prompt: an advantage needs at least 2 of either")
    if scored is None:
        scored = torch.ones_like(rewards, dtype=torch.bool)
    require_same_shape("scored", scored, "rewards", rewards)
    rewards = torch.where(scored, rewards.detach().float(), 0.0)
    demand(finite("rewards", rewards))
    counts = scored.sum(dim=2)
    plan_rewards = mean_over_renders(rewards, scored)
    plan = _normalise_groups(plan_rewards, counts > 0, scale, eps) if plans > 1 else torch.zeros_like(plan_rewards)
    render = torch.zeros_like(rewards)
    if across_plans:
        render = _normalise_groups(rewards.flatten(1), scored.flatten(1), scale, eps).view_as(rewards)
    elif renders > 1:
        render = _normalise_groups(rewards, scored, scale, eps)
    return PlanRenderAdvantages(plan, render, _plan_variance_share(rewards[scored.flatten(1).all(dim=1)]))


def plan_render_gdpo(
    components: Mapping[str, Tensor], weights: Mapping[str, float], *, eps: float = 1e-4, across_plans: bool = False
) -> tuple[Tensor, Tensor]:
    """`combine_rewards` with "gdpo" at both levels of the credit tree: advantages of plans [P, N], renders [P, N, M].

    `components`: metric -> [P, N, M], NaN where it does not apply. A plan's score in a metric is the mean over those of
    its renders to which it applies; plans are compared with the other plans of the prompt, renders with the renders of
    the same plan, or with `across_plans` of the prompt. A sample to which no metric applies gets zero, and so does a
    level with one member per group.

    Raises ValueError for shapes, names or weights that do not fit, infinite values, and N = M = 1.
    """
    _require_scale("group", eps)
    flat = {name: values.flatten(1) if values.ndim == 3 else values for name, values in components.items()}
    names = _component_names(flat, weights)
    for name in names:
        require_ndim(f"components[{name!r}]", components[name], 3, "[P, N, M]")
    rewards = torch.stack([components[name].detach().float() for name in names])  # [K, P, N, M]
    applies = ~torch.isnan(rewards)
    demand(finite("components", torch.where(applies, rewards, 0.0)))
    if rewards.shape[2] == rewards.shape[3] == 1:
        raise ValueError("components have one plan and one render per prompt: an advantage needs at least 2 of either")
    weight = torch.tensor([weights[name] for name in names], device=rewards.device).float()
    filled, counts = torch.where(applies, rewards, 0.0), applies.sum(dim=3)
    plan_rewards = mean_over_renders(filled, applies)
    plan, render = torch.zeros_like(plan_rewards[0]), torch.zeros_like(rewards[0])
    if rewards.shape[2] > 1:
        plan = _gdpo(plan_rewards, counts > 0, weight[:, None, None], eps)
    if across_plans:
        render = _gdpo(filled.flatten(2), applies.flatten(2), weight[:, None, None], eps).view_as(render)
    elif rewards.shape[3] > 1:
        render = _gdpo(filled, applies, weight[:, None, None, None], eps)
    return plan, render


def mean_over_renders(rewards: Tensor, applies: Tensor) -> Tensor:
    """[..., N] fp32: a plan's mean over those of its renders to which `applies` [..., N, M] bool, 0 without any.

    In fp64, in which sums of a few fp32 numbers are exact: plans whose renders have the same rewards in another order
    are equal, and no rounding is turned into an advantage between them.
    """
    total = torch.where(applies, rewards, 0.0).double().sum(dim=-1)
    return (total / applies.sum(dim=-1).clamp(min=1)).float()


def _gdpo(rewards: Tensor, applies: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., G] of `rewards`, `applies` [K, ..., G]: metrics normalised in their groups, then the sum over its std."""
    total = (weight * _normalise_groups(rewards, applies, "group", eps)).sum(dim=0)
    return total / (total.std() + eps)


def _require_scale(scale: str, eps: float) -> None:
    require_choice("scale", scale, _SCALES)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")


def _normalise_groups(rewards: Tensor, applies: Tensor, scale: Scale, eps: float) -> Tensor:
    """[..., G] -> the same; statistics over the entries where `applies` [..., G] bool, zero elsewhere and in groups
    that do not spread."""
    count = applies.sum(dim=-1, keepdim=True)
    mean = torch.where(applies, rewards, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(applies, rewards - mean, 0.0)
    # by the extremes: the mean of equal rewards is rounded, and a std of 1e-9 would turn that into an advantage
    highest = torch.where(applies, rewards, -math.inf).amax(dim=-1, keepdim=True)
    lowest = torch.where(applies, rewards, math.inf).amin(dim=-1, keepdim=True)
    spreads = applies & (highest > lowest)
    if scale == "group":
        centred = centred / ((centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps)
    elif scale == "batch":
        total = applies.sum()
        overall = torch.where(applies, rewards, 0.0).sum() / total.clamp(min=1)
        squares = torch.where(applies, rewards - overall, 0.0).square().sum()
        centred = centred / ((squares / (total - 1).clamp(min=1)).sqrt() + eps)
    return torch.where(spreads, centred, 0.0)


def _component_names(components: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[str]:
    """The metric names in the order of `weights`, after checking that the two mappings fit together."""
    if not weights or set(components) != set(weights):
        unweighted = sorted(set(components) - set(weights))
        unmeasured = sorted(set(weights) - set(components))
        raise ValueError(
            "components and weights must name the same metrics, at least one; "
            f"without weight: {unweighted}, without component: {unmeasured}"
        )
    names = list(weights)
    for name in names:
        require_ndim(f"components[{name!r}]", components[name], 2, "[P, G]")
        if components[name].shape != components[names[0]].shape:
            raise ValueError(
                f"components[{name!r}] has shape {list(components[name].shape)}, "
                f"components[{names[0]!r}] has {list(components[names[0]].shape)}: all must agree"
            )
        if not math.isfinite(weights[name]):
            raise ValueError(f"weights[{name!r}] must be a finite number, got {weights[name]}")
    if all(weight == 0 for weight in weights.values()):
        raise ValueError("weights are all zero: nothing would be rewarded")
    return names


def _require_scorable(names: list[str], rewards: Tensor, counts: Tensor) -> None:
    """No infinities in `rewards` [K, P, G], and at least one metric that counts for every sample."""
    infinite = torch.isinf(rewards).flatten(1).any(dim=1)
    unscored = ~counts.any(dim=0)
    if not bool(infinite.any() | unscored.any()):
        return
    for name, is_infinite in zip(names, infinite.tolist(), strict=True):
        if is_infinite:
            raise ValueError(f"components[{name!r}] holds infinite values")
    where = [tuple(index) for index in unscored.nonzero().tolist()]
    raise ValueError(
        f"components: no metric with a weight applies to {len(where)} samples, first at (prompt, sample) {where[:5]}"
    )


def _plan_variance_share(rewards: Tensor) -> Tensor:
    """0-dim intraclass correlation of `rewards` [P, N, M], NaN where it cannot be identified."""
    prompts, plans, renders = rewards.shape
    if plans == 1 or renders == 1:
        return torch.full((), math.nan, device=rewards.device)
    plan_means = rewards.mean(dim=2, keepdim=True)
    between = renders * (plan_means - plan_means.mean(dim=1, keepdim=True)).square().sum() / (prompts * (plans - 1))
    within = (rewards - plan_means).square().sum() / (prompts * plans * (renders - 1))
    plan_variance = ((between - within) / renders).clamp(min=0)
    no_spread = (rewards.flatten(1).amax(dim=1) == rewards.flatten(1).amin(dim=1)).all()
    return torch.where(no_spread, math.nan, plan_variance / (plan_variance + within))
