"""Groups whose rewards are all equal teach nothing: the next prompts are drawn in their place (DAPO's dynamic sampling,
arXiv:2503.14476), for a bounded number of rounds.

C chunks of b prompts on each of W processes; P prompts, N plans per prompt, M renders per plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.data.samplers.sampler import Place, StatefulSampler
from glm_training.models.glm_image.joining import join_plans, join_renders
from glm_training.reinforcement.credit import Scored, flat_groups, mean_of_scored
from glm_training.reinforcement.rollout import Rollout
from glm_training.rewards import RewardResult
from glm_training.utils.distributed import World, gather_tensor


@dataclass(frozen=True)
class Resampling:
    """What new samples need of the run."""

    config: Config
    world: World
    sampler: StatefulSampler
    parts: Collection[str]
    """The trained halves."""
    sample: Callable[[list[Place]], Scored]
    """New samples of these prompts with their scores."""
    check_stop: Callable[[], None]
    """Raises StopRequested while the step can still be dropped; every process calls it equally often."""
    draw_along: Callable[[Place], None] | None = None
    """Draws a prompt and drops it: of a run whose halves lie in shards, which all processes gather together."""


def replace_flat_groups(run: Resampling, chunks: list[Scored]) -> tuple[list[Scored], dict[str, float]]:
    """The chunks with flat groups replaced, and the figures of it; at most `reward.grpo.max_resamples` rounds.

    Every flat group takes the next prompt of the run's sequence, in the order of the step's prompts, whatever the
    number of processes. What is still flat at the end stays, and counts among the zero-spread groups. The rewards that
    are logged are then those of the groups that were kept: `reward/total_before_resampling` has the others too.
    """
    rounds = run.config.reward.grpo.max_resamples
    if rounds == 0:
        return chunks, {}
    totals = gather_tensor(run.world, torch.cat([chunk.rewards() for chunk in chunks]))
    figures: dict[str, float] = {}
    if not totals.isnan().all():
        figures["reward/total_before_resampling"] = mean_of_scored(totals)
    drawn = 0
    for _ in range(rounds):
        flat = torch.stack([_flat(run, chunk) for chunk in chunks])  # [C, b]
        ranks = gather_tensor(run.world, flat[None].int())  # [W, C, b]
        order = ranks.transpose(0, 1).flatten().cumsum(0).view(len(chunks), -1, flat.shape[1])  # [C, W, b]
        total = int(order.flatten()[-1])
        if total == 0:
            break
        drawn += total
        taken = run.sampler.take(total)
        places = (order[:, run.world.rank][flat] - 1).tolist()  # of this process's flat groups, among all
        most = int(ranks.sum(dim=(1, 2)).max())
        chunks = _redraw(run, chunks, flat, [taken[place] for place in places], most, taken[0])
    return chunks, figures | {"reward/resampled_groups": float(drawn)}


def _redraw(
    run: Resampling, chunks: list[Scored], flat: Tensor, prompts: list[Place], most: int, idle: Place
) -> list[Scored]:
    """`chunks` with new samples of `prompts` at the places of `flat` [C, b]; `most` is the largest number of prompts
    that any process draws, at most batch_size of them at once. One without any draws `idle` along where it must.

    All processes poll after each part, equally often: there one whose rewards fail is waited for.
    """
    size = run.config.training.batch_size
    waiting = flat.flatten().nonzero().flatten()
    for start in range(0, most, size):
        part = prompts[start : start + size]
        if part:
            fresh = run.sample(part)
            places = torch.zeros(flat.numel(), dtype=torch.bool)
            places[waiting[start : start + size]] = True
            chunks = _fill(chunks, places.view_as(flat), fresh)
        elif run.draw_along is not None:
            run.draw_along(idle)
        run.check_stop()
    return chunks


def _flat(run: Resampling, chunk: Scored) -> Tensor:
    """[P] bool: the prompts whose rewards are all equal for every trained half."""
    weights = [run.config.reward_weights_for("ar" if part == "ar" else "dit") for part in run.parts]
    return torch.stack([flat_groups(chunk.rewards(own)) for own in weights]).all(dim=0)


def _fill(chunks: list[Scored], flat: Tensor, fresh: Scored) -> list[Scored]:
    """`chunks` with the prompts at `flat` [C, b] replaced by those of `fresh`, in order."""
    filled, used = [], 0
    for chunk, row in zip(chunks, flat, strict=True):
        count = int(row.sum())
        if count:
            prompts = torch.arange(len(row))
            prompts[row] = len(row) + used + torch.arange(count)
            chunk = replace(_select(chunk, fresh, prompts), first_prompt=chunk.first_prompt)
        used += count
        filled.append(chunk)
    return filled


def _select(first: Scored, second: Scored, prompts: Tensor) -> Scored:
    """The given prompts of both, the second's counted after the first's."""
    one, two = first.rollout, second.rollout
    plans = _rows(prompts, len(one.plans) // len(one.prompts))
    images = _rows(prompts, len(one.images) // len(one.prompts))
    positions, names = one.positions + two.positions, one.prompts + two.prompts
    device = one.images.device
    rollout = Rollout(
        [names[p] for p in prompts.tolist()],
        [positions[p] for p in prompts.tolist()],
        join_plans(one.plans, two.plans).select(plans.to(device)),
        join_renders(one.renders, two.renders).select(images.to(device)),
        torch.cat([one.images, two.images])[images.to(device)],
        _joined(one.targets, two.targets, prompts),
        _joined(one.sources, two.sources, prompts),
        one.plan_seconds,
    )
    return Scored(rollout, _results(first.result, second.result, images))


def _rows(prompts: Tensor, each: int) -> Tensor:
    return (prompts[:, None] * each + torch.arange(each)).flatten()


def _joined(first: Tensor | None, second: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])[rows.to(first.device)]


def _results(first: RewardResult, second: RewardResult, rows: Tensor) -> RewardResult:
    shifted = {row + len(first.total): why for row, why in second.failures.items()}
    failures = first.failures | shifted
    return RewardResult(
        torch.cat([first.total, second.total])[rows],
        {name: torch.cat([values, second.components[name]])[rows] for name, values in first.components.items()},
        {place: failures[row] for place, row in enumerate(rows.tolist()) if row in failures},
        first.names,
    )
