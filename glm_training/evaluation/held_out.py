"""Scores of the evaluation prompts, drawn with the same noise at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm_training.data import Batch
from glm_training.models.family import Family, Sampling
from glm_training.rewards import RewardBatch, RewardCalculator, RewardSampleError, score_batch
from glm_training.utils.distributed import World, gather_tensor
from glm_training.utils.failures import tell_once
from glm_training.utils.pictures import Pictures

IMAGES_AT_ONCE = 32
"""Pictures that are drawn, then scored, together: with more of them drawing is hardly faster, and the first scores are
told later."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How the evaluation prompts are drawn: `samples` per prompt, all from `seed`."""

    height: int
    width: int
    samples: int
    seed: int
    sampling: Sampling
    micro_batch_size: int | None
    vae_batch_size: int | None = None


@dataclass
class Evaluation:
    """`scores`: metric name ("total" and each component) -> [P] means over the samples of a prompt, NaN where the
    metric does not apply. `images` are the first sample of the first p prompts, none where nothing was drawn. `judged`:
    figures [V] of held-out pairs or targets, by name. `shown`: the scores [p] of `images` themselves, by name, empty
    where they were not scored."""

    scores: dict[str, Tensor]
    images: Pictures
    judged: dict[str, Tensor] = field(default_factory=dict)
    shown: dict[str, Tensor] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean over prompts, or over what is judged, of each figure that applies anywhere."""
        every = {**self.scores, **self.judged}
        return {name: values.nanmean().item() for name, values in every.items() if not values.isnan().all()}


def combined(groups: Sequence[Sequence[int]], found: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several, each of the prompts at some places, of which it kept the images of the first ones."""
    kept: dict[int, Tensor] = {}
    for group, each in zip(groups, found, strict=True):
        kept |= zip(group, each.images, strict=False)
    return Evaluation(
        _placed(groups, [each.scores for each in found], sum(map(len, groups))),
        [kept[place] for place in sorted(kept)],
        shown=_placed(groups, [each.shown for each in found], len(kept)),
    )


def _placed(groups: Sequence[Sequence[int]], found: Sequence[Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Scores [count] by name, of those of the first places of each group; NaN where a group has none."""
    placed = {name: torch.full((count,), torch.nan) for scores in found for name in scores}
    for group, scores in zip(groups, found, strict=True):
        for name, values in scores.items():
            placed[name][list(group)[: len(values)]] = values
    return placed


@torch.no_grad()
def evaluate(
    family: Family,
    calculator: RewardCalculator | None,
    batch: Batch,
    settings: EvaluationSettings,
    world: World,
    *,
    keep_images: int,
    prompts_at_once: int | None = None,
    on_step: Callable[[], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    also: Callable[[RewardBatch], dict[str, Tensor]] | None = None,
    on_scored: Callable[[int, Tensor | None], None] | None = None,
) -> Evaluation:
    """Draws and scores every prompt of `batch`, shared out over the processes; each gets the whole result.

    Without `calculator` there is no "total". `also` gives further scores [B] by name, which count in no total. The
    images of the first `keep_images` prompts are kept. `on_step` is called throughout the drawing, equally often on
    every process, and may raise to abandon the evaluation; `stopped` is asked while pictures are scored, and ends that
    with ScoringStopped. `on_scored` is told, after each `prompts_at_once` of a process, how many prompts are done and
    the totals of the pictures that this process has just scored, None without `calculator`.
    """
    prompts_at_once = prompts_at_once or max(1, IMAGES_AT_ONCE // settings.samples)
    count, kept = len(batch.prompts), min(keep_images, len(batch.prompts))
    # every process draws equally many, so that all meet in the same places: who has none left repeats the last prompt
    share, kept_share = -(-count // world.world_size), -(-kept // world.world_size)
    mine = [min(world.rank + i * world.world_size, count - 1) for i in range(share)]
    scored_samples, images = [], []
    names: list[str] = []
    for start in range(0, share, prompts_at_once):
        rows = mine[start : start + prompts_at_once]
        drawn = draw(family, batch, rows, settings, samples=settings.samples, on_step=on_step)
        with torch.autocast(drawn.device.type, enabled=False):  # metrics compute in fp32, as in training
            scored = _reward_batch(batch, rows, drawn, settings.samples, stopped)
            columns: dict[str, Tensor] = {}
            if calculator is not None:
                result = score_batch(calculator, scored)
                columns = {"total": result.total, **result.components}
                for reason in list(result.failures.values())[:1]:
                    missing = f"{len(result.failures)} of {len(result.total)} are left out (reward.on_error: skip)"
                    tell_once("scoring pictures of an evaluation", RewardSampleError(reason), missing)
            if also is not None:
                columns |= also(scored)
        names = list(columns)
        scored_samples.append(torch.stack([values.view(len(rows), -1) for values in columns.values()], dim=-1))
        images.append(drawn[:: settings.samples][: max(0, kept_share - start)].cpu())
        if on_scored is not None:
            on_scored(min(count, (start + len(rows)) * world.world_size), columns.get("total"))
        if on_step is not None:
            on_step()
    samples = gather_tensor(world, torch.cat(scored_samples))[_interleaved(count, share, world.world_size)]
    pictures = gather_tensor(world, torch.cat(images))[_interleaved(kept, kept_share, world.world_size)]
    scores, shown = samples.nanmean(dim=1), samples[:kept, 0]
    return Evaluation(
        {name: scores[:, column] for column, name in enumerate(names)},
        pictures,
        shown={name: shown[:, column] for column, name in enumerate(names)},
    )


@torch.no_grad()
def draw(
    family: Family,
    batch: Batch,
    rows: Sequence[int],
    settings: EvaluationSettings,
    *,
    samples: int,
    on_step: Callable[[], None] | None,
) -> Tensor:
    """`samples` images of each of the given rows of `batch`, [R * samples, 3, H, W] in [0, 1] on the model's device.

    An image depends on its prompt, its place in the data and the seed alone.
    """
    if on_step is not None:
        on_step()  # shards are gathered first of all, for which each process must have come this far
    device = next(iter(family.component(family.components[0]).parameters())).device
    return family.draw(
        [batch.prompts[row] for row in rows],
        height=settings.height,
        width=settings.width,
        sources=None if batch.sources is None else batch.sources[list(rows)].to(device),
        seed=settings.seed,
        sampling=settings.sampling,
        samples=samples,
        prompt_ids=[batch.indices[row] for row in rows],
        micro_batch_size=settings.micro_batch_size,
        vae_batch_size=settings.vae_batch_size,
        on_step=on_step,
    )


def _reward_batch(
    batch: Batch, rows: Sequence[int], images: Tensor, samples: int, stopped: Callable[[], bool]
) -> RewardBatch:
    repeated = [row for row in rows for _ in range(samples)]
    return RewardBatch(
        images,
        [batch.prompts[row] for row in repeated],
        None if batch.targets is None else batch.targets[repeated],
        None if batch.sources is None else batch.sources[repeated],
        stopped,
    )


def _interleaved(count: int, share: int, world_size: int) -> list[int]:
    """Where prompt i lies after a gather of `share` rank-strided rows from each process."""
    return [(i % world_size) * share + i // world_size for i in range(count)]
