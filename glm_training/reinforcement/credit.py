"""From the raw rewards of a step to the advantages of its plans and renders, over all processes.

P prompts, N plans per prompt, M renders per plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glm_training.algorithms.advantages import (
    PlanRenderAdvantages,
    Scale,
    mean_over_renders,
    plan_render_advantages,
    plan_render_gdpo,
)
from glm_training.algorithms.stage import entropy_bonus
from glm_training.config import Config
from glm_training.config.sections.base import Part
from glm_training.engine.figures import Mean
from glm_training.reinforcement.rollout import Rollout
from glm_training.rewards import RewardResult
from glm_training.utils.distributed import World, gather_objects, gather_tensor
from glm_training.utils.randomness import make_generator


@dataclass
class Scored:
    """A rollout of P prompts with its scores and, once the whole step is known, the advantages of its rows.

    first_prompt: the place of its first prompt among all prompts of the step, over chunks and processes.
    plan_advantages: [P*N]; render_advantages: [P*N*M]. left_out: bool of the same shapes on the CPU, of what no term of
    a half's loss has although it is scored. entropies [2, P*N]: mean entropy of the tokens of a plan (nats), under the
    policy that drew and under the reference. token_weights [P*N, 2, T]: of the tokens' advantages and of their KL.
    """

    rollout: Rollout
    result: RewardResult
    first_prompt: int = 0
    plan_advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    render_advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    left_out: dict[Part, Tensor] = field(default_factory=dict)
    entropies: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    token_weights: Tensor | None = None

    def rewards(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """Totals [P, N, M] on the CPU, under `weights` or those of the calculator; NaN where there is none."""
        total = self.result.total if weights is None else self.result.total_for(weights)
        return self.shaped(total)

    def has_score(self, part: Part) -> Tensor:
        """Bool [P*N] of the plans with a scored render, or [P*N*M] of the renders; on the CPU."""
        scored = ~self.rewards().isnan()
        return scored.any(dim=2).flatten() if part == "ar" else scored.flatten()

    def learned_from(self, part: Part) -> Tensor:
        """Bool as `has_score`, of what the loss of a half has."""
        scored = self.has_score(part)
        return scored & ~self.left_out[part] if part in self.left_out else scored

    def shaped(self, values: Tensor) -> Tensor:
        """[P*N*M] as [P, N, M]."""
        prompts = len(self.rollout.prompts)
        return values.view(prompts, len(self.rollout.plans) // prompts, -1)


def assign_advantages(chunks: list[Scored], config: Config, world: World, step: int) -> dict[str, float]:
    """Fills in the advantages of `chunks`, compared over the whole step, and returns the figures of its raw rewards.

    A sample that could not be scored, and a plan none of whose renders could, counts nowhere: it gets zero here, and no
    term of the loss (`updates`). So does, for a half with weights of its own, one that none of their metrics applies
    to. The reward weight of a half scales its advantages last, so that the KL beside them keeps its own weight.
    """
    grpo = config.reward.grpo
    rewards = gather_tensor(world, torch.cat([chunk.rewards() for chunk in chunks]))
    figures = _figures(chunks, world, rewards)
    chosen: dict[Part, Tensor] = {}
    left_out: dict[Part, Tensor] = {}
    shared: dict[Scale, PlanRenderAdvantages] = {}  # of what both halves are rewarded for
    halves: tuple[tuple[Part, str], ...] = (("ar", "plan"), ("dit", "render"))
    for part, level in halves:
        own, policy = config.reward_weights_for(part), config.policy_for(part)
        rest, totals = (policy.advantage_scale, own), rewards
        if own is None:
            if policy.advantage_scale not in shared:
                shared[policy.advantage_scale] = _compare(chunks, config, world, rewards, *rest)
            compared = shared[policy.advantage_scale]
            if not compared.plan_variance_share.isnan():
                figures["reward/plan_variance_share"] = compared.plan_variance_share.item()
        else:
            totals = gather_tensor(world, torch.cat([chunk.rewards(own) for chunk in chunks]))
            if not totals.isnan().all():
                figures[f"reward/{part}_total"] = mean_of_scored(totals)
            compared = _compare(chunks, config, world, totals, *rest)
        if part == "ar" and grpo.ar.entropy_reward > 0:
            compared = _compare(chunks, config, world, _with_entropy(chunks, config, world, totals), *rest)
        values = compared.plan if part == "ar" else compared.render
        judged = ~totals.isnan().all(dim=2) if part == "ar" else ~totals.isnan()
        if grpo.shuffle_advantages:
            values = _shuffled(values, judged, config.seed, level, step)
        left_out[part] = ~judged
        if policy.skip_flat_groups:
            levels = (1, 2) if part == "dit" and grpo.dit.compared_with == "prompt" else -1
            left_out[part] = left_out[part] | ~values.ne(0).any(dim=levels, keepdim=True)
        chosen[part] = values.clamp(-grpo.advantage_clip, grpo.advantage_clip) * policy.reward_weight
    # a process's prompts lie together in what was gathered, chunk after chunk
    start = sum(gather_objects(world, sum(len(chunk.rollout.prompts) for chunk in chunks))[: world.rank])
    for chunk in chunks:
        rows = slice(start, start + len(chunk.rollout.prompts))
        chunk.plan_advantages = chosen["ar"][rows].flatten().to(world.device)
        chunk.render_advantages = chosen["dit"][rows].flatten().to(world.device)
        chunk.left_out = {part: values[rows].flatten() for part, values in left_out.items()}
        start += len(chunk.rollout.prompts)
    return figures


def _compare(
    chunks: list[Scored],
    config: Config,
    world: World,
    rewards: Tensor,
    scale: Scale,
    own: Mapping[str, float] | None,
) -> PlanRenderAdvantages:
    """Advantages of the whole step's plans and renders, by their totals `rewards` [P, N, M] or metric by metric."""
    scored, across = ~rewards.isnan(), config.reward.grpo.dit.compared_with == "prompt"
    tree = plan_render_advantages(rewards, scale=scale, scored=scored, across_plans=across)
    if config.reward.combine == "sum":
        return tree
    weights = chunks[0].result.by_name(own or config.reward.metric_weights())
    if not set(weights) <= set(chunks[0].result.components):  # a calculator of the user's has scores of its own
        weights = dict.fromkeys(chunks[0].result.components, 1.0)
    columns = torch.stack(
        [torch.cat([chunk.shaped(chunk.result.components[name]) for chunk in chunks]) for name in weights], dim=-1
    )
    gathered = gather_tensor(world, columns).masked_fill(~scored[..., None], math.nan)
    by_name = {name: gathered[..., k] for k, name in enumerate(weights)}
    plan, render = plan_render_gdpo(by_name, weights, across_plans=across)
    return replace(tree, plan=plan, render=render)


def _with_entropy(chunks: list[Scored], config: Config, world: World, totals: Tensor) -> Tensor:
    """`totals` [P, N, M] with the entropy reward of each plan (STAGE)."""
    found = torch.cat([chunk.entropies.T.cpu() for chunk in chunks]).view(-1, totals.shape[1], 2)
    drawn, reference = gather_tensor(world, found).unbind(dim=2)
    scored = ~totals.isnan()
    means = mean_over_renders(totals, scored).masked_fill(~scored.any(dim=2), math.nan)
    bonus = entropy_bonus(means, drawn, reference)
    return totals + config.reward.grpo.ar.entropy_reward * bonus[:, :, None]


def _shuffled(advantages: Tensor, scored: Tensor, seed: int, level: str, step: int) -> Tensor:
    """The same advantages on other samples that have a score: what a control run learns from."""
    values = advantages[scored]
    order = torch.randperm(len(values), generator=make_generator(seed, f"shuffle/{level}", step))
    return advantages.masked_scatter(scored, values[order])


def _figures(chunks: list[Scored], world: World, rewards: Tensor) -> dict[str, float]:
    """Raw rewards: the mean of the total and of each component over all samples of the step, and their spread."""
    figures: dict[str, float] = {} if rewards.isnan().all() else {"reward/total": mean_of_scored(rewards)}
    names = list(chunks[0].result.components)
    columns = [torch.cat([chunk.result.components[name] for chunk in chunks]) for name in names]
    gathered = gather_tensor(world, torch.stack(columns, dim=1))
    for column, name in enumerate(names):
        values = gathered[:, column]
        if not values.isnan().all():
            figures[f"reward/{name}"] = mean_of_scored(values)
    groups = [group[~group.isnan()] for group in rewards.flatten(1)]
    spreads = [group.std() for group in groups if len(group) > 1]
    if spreads:
        figures["reward/group_std"] = Mean(torch.stack(spreads).mean().item(), len(spreads))
    figures["reward/zero_spread_groups"] = float(flat_groups(rewards).sum())
    figures["reward/skipped_samples"] = float(rewards.isnan().sum())
    return figures


def mean_of_scored(values: Tensor) -> Mean:
    """The mean of all that is not NaN, which is something, with their number."""
    return Mean(values.nanmean().item(), int((~values.isnan()).sum()))


def flat_groups(rewards: Tensor) -> Tensor:
    """[P] bool: the prompts whose scored rewards [P, N, M] are all equal, from which nothing can be learned."""
    values = rewards.flatten(1)
    highest = values.nan_to_num(-math.inf).amax(dim=1)
    lowest = values.nan_to_num(math.inf).amin(dim=1)
    # not ==: a group without any score has -inf and inf here, and is flat as well
    return ~(highest > lowest)
