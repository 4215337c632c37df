"""From the raw rewards of a step to the advantages of its plans and renders, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.advantages import PlanRenderAdvantages, plan_render_advantages
from glm_training.config import Config
from glm_training.rewards import RewardResult
from glm_training.trainers.rollout import Rollout
from glm_training.utils.distributed import World, gather_tensor
from glm_training.utils.randomness import make_generator


@dataclass
class Scored:
    """A rollout of P prompts with its rewards [P, N, M] and, once the whole step is known, the advantages of its rows.

    first_prompt: the place of its first prompt among all prompts of the step, over chunks and processes.
    plan_advantages: [P*N]; render_advantages: [P*N*M].
    """

    rollout: Rollout
    rewards: Tensor
    result: RewardResult
    first_prompt: int
    plan_advantages: Tensor
    render_advantages: Tensor


def assign_advantages(chunks: list[Scored], config: Config, world: World, step: int) -> dict[str, float]:
    """Fills in the advantages of `chunks`, compared over the whole step, and returns the figures of its raw rewards.

    A sample that could not be scored, and a plan none of whose renders could, counts nowhere and gets zero. The reward
    weight of a half scales its advantages last, so that the KL beside them keeps its own weight.
    """
    grpo = config.reward.grpo
    rewards = gather_tensor(world, torch.cat([chunk.rewards for chunk in chunks]))
    advantages = plan_render_advantages(rewards, scale=grpo.advantage_scale, scored=~rewards.isnan())
    plan, render = advantages.plan, advantages.render
    if grpo.shuffle_advantages:
        plan, render = (
            _shuffled(values, config.seed, level, step) for values, level in ((plan, "plan"), (render, "render"))
        )
    plan, render = (values.clamp(-grpo.advantage_clip, grpo.advantage_clip) for values in (plan, render))
    plan, render = plan * config.policy_for("ar").reward_weight, render * config.policy_for("dit").reward_weight
    start = world.rank * sum(len(chunk.rewards) for chunk in chunks)
    for chunk in chunks:
        rows = slice(start, start + len(chunk.rewards))
        chunk.plan_advantages = plan[rows].flatten().to(world.device)
        chunk.render_advantages = render[rows].flatten().to(world.device)
        start += len(chunk.rewards)
    return _figures(chunks, world, rewards, advantages)


def _shuffled(advantages: Tensor, seed: int, level: str, step: int) -> Tensor:
    """The same advantages on other samples: what a control run learns from."""
    order = torch.randperm(advantages.numel(), generator=make_generator(seed, f"shuffle/{level}", step))
    return advantages.flatten()[order].view_as(advantages)


def _figures(chunks: list[Scored], world: World, rewards: Tensor, advantages: PlanRenderAdvantages) -> dict[str, float]:
    """Raw rewards: the mean of the total and of each component over all samples of the step, and their spread."""
    figures = {} if rewards.isnan().all() else {"reward/total": rewards.nanmean().item()}
    names = list(chunks[0].result.components)
    columns = [torch.cat([chunk.result.components[name] for chunk in chunks]) for name in names]
    gathered = gather_tensor(world, torch.stack(columns, dim=1))
    for column, name in enumerate(names):
        values = gathered[:, column]
        if not values.isnan().all():
            figures[f"reward/{name}"] = values.nanmean().item()
    groups = [group[~group.isnan()] for group in rewards.flatten(1)]
    spreads = [group.std() for group in groups if len(group) > 1]
    if spreads:
        figures["reward/group_std"] = torch.stack(spreads).mean().item()
    figures["reward/zero_spread_groups"] = float(sum(not (group != group[:1]).any() for group in groups))
    figures["reward/skipped_samples"] = float(rewards.isnan().sum())
    if not advantages.plan_variance_share.isnan():
        figures["reward/plan_variance_share"] = advantages.plan_variance_share.item()
    return figures
