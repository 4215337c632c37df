"""What a run tells in tables: what it trains, its evaluations, and at the end what changed from before to after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.data import ImageDataset
from glm_training.engine.validation import Subject
from glm_training.evaluation.held_out import Evaluation
from glm_training.utils.console import Console
from glm_training.utils.distributed import World
from glm_training.utils.failures import beside_training
from glm_training.utils.figure_names import RIGHT, direction, label
from glm_training.utils.pictures import NO_CAPTION, Caption, Pictures, save_grid
from glm_training.utils.statistics import Estimate, estimate
from glm_training.utils.words import counted, number


def opening_lines(config: Config, world: World, items: int, steps: int) -> list[str]:
    """What a run says before its first step: `items` prompts (or pairs) in the data, `steps` of the whole run."""
    lines = [outline(config, world, items, steps)]
    for part in config.parts():
        warmup = config.optimizer_for(part).warmup_steps
        if warmup >= steps > 1:
            lines.append(
                f"note: {part} warms up for {warmup} steps and the run has {steps}: it never reaches its learning rate "
                "(training.warmup_steps)"
            )
    return lines


def resumed_line(config: Config, checkpoint: Path, step: int, steps: int) -> str:
    """Of a run of `steps` steps that goes on from `checkpoint`, made after `step` of them; where none are left, what
    to do."""
    if step < steps:
        return f"resumed from {checkpoint}, step {step} of {steps}"
    key = "training.num_epochs" if config.training.max_steps is None else "training.max_steps"
    past, back = f"all {steps} of its steps", ""
    if step > steps:
        past = f"{step} steps, past the {steps} that it is to have ({key})"
        back = ", and --resume with an earlier checkpoint goes back to it"
    return (
        f"resumed from {checkpoint}: the run has {past}, and nothing is left to train. A larger {key} trains on{back}"
    )


def outline(config: Config, world: World, prompts: int, steps: int) -> str:
    """One line on what a run trains: `prompts` (or pairs, or pictures) in the data, `steps` of the whole run."""
    halves = " and ".join({"ar": "AR", "dit": "DiT", "unet": "UNet"}.get(part, part) for part in config.parts())
    noun = "" if config.model.family != "glm_image" else " halves" if len(config.parts()) > 1 else " half"
    learns_pictures = config.model.family == "vgt" or (config.uses_supervision() and not config.uses_reward())
    what = "pair" if config.training.method == "dpo" else "picture" if learns_pictures else "prompt"
    adapters = " (LoRA adapters)" if any(config.lora_for(part).enabled for part in config.parts()) else ""
    at_once = config.training.batch_size * config.training.gradient_accumulation_steps * world.world_size
    batch = ("up to " if config.data.buckets.enabled else "") + counted(at_once, what)
    if config.uses_reward():
        batch += f" x {counted(config.reward.grpo.num_samples, 'image')}"
    place = str(world.device) if world.world_size == 1 else f"{world.world_size} processes"
    return (
        f"training the {halves}{noun}{adapters} of {config.model.name} on {counted(prompts, what)}: "
        f"{counted(steps, 'step')} of {batch}, on {place}"
    )


Subjects = tuple[Subject, Subject | None]
"""What is drawn for, and what is judged besides."""

DIGITS = 16
"""Of the digest that tells whether two evaluations are of the same things."""


@dataclass
class TrainResult:
    """What a finished run hands back. `before` and `after` are the means of the evaluations by figure, empty without;
    `stopped_by` is the signal that stopped it, `halted` why a monitor did. None where the run went to its end."""

    step: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    stopped_by: int | None = None
    halted: str | None = None


SHOWN_BELOW = 8
"""Prompts below each other in a picture; more of them stand in parts, side by side."""
COLUMNS = ("change", "standard error", "")


def write_summary(
    console: Console,
    config: Config,
    held_out: ImageDataset,
    subjects: Subjects,
    before: Evaluation,
    after: Evaluation,
    before_step: int,
) -> None:
    """Prints what was scored and judged before and after, and saves the first prompts' pictures side by side.

    `before_step`: where `before` was taken, in a resumed run perhaps not at the start; the headings then say so.
    """
    earlier = "before" if before_step == 0 else f"step {before_step}"
    prompts, judged = subjects
    with beside_training("the table of scores before and after"):
        weights = config.scored_weights()
        alone = only_metric(before, after)
        rows = [
            summary_row(score_label(name, alone), before.scores[name], values, weights.get(name, 1.0) >= 0)
            for name, values in sorted(after.scores.items(), key=lambda score: score[0] != RIGHT)
            if name in before.scores and not values.isnan().all() and name != alone
        ]
        if rows:
            samples = counted(config.evaluation.samples_per_prompt, "sample")
            console.table(f"Scores of {prompts} x {samples}", ["score", earlier, "after", *COLUMNS], rows)
        rows = [
            summary_row(label(name), before.judged[name], values, direction(name))
            for name, values in after.judged.items()
            if name in before.judged and not name.endswith("_change")  # which is none before
        ]
        if rows:
            console.table(f"Judged on {judged}", ["figure", earlier, "after", *COLUMNS], rows)
    if len(before.images) and len(after.images):
        with beside_training("writing the picture of before and after"):
            path = config.output_dir / "samples" / "before_after.png"
            write_pictures(path, held_out, {earlier: before, "after": after}, prompts.name)
            console.line(f"pictures before and after, of {prompts.name}s: {path}")


def only_metric(*evaluations: Evaluation) -> str | None:
    """The one metric of which the reward consists, so that it need not be printed twice; None where there are more."""
    same: list[set[str]] = []
    for evaluation in evaluations:
        total = evaluation.scores.get("total")
        others = [(name, values) for name, values in evaluation.scores.items() if name != "total"]
        same.append({name for name, values in others if total is not None and _equal(values, total)})
    found = set.intersection(*same)
    return found.pop() if len(found) == 1 else None


def _equal(first: Tensor, second: Tensor) -> bool:
    return bool(torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num()))


def score_label(name: str, alone: str | None) -> str:
    """What a score is called on the terminal; `alone`: the metric that is the whole reward."""
    return f"reward ({label(alone)})" if name == "total" and alone is not None else label(name)


def images_of(held_out: ImageDataset, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The sources and the targets of the first `count` prompts, each of its own size; none where there are none."""
    batches = [held_out.batch([row]) for row in range(count)]
    sources = [batch.sources[0] for batch in batches if batch.sources is not None]
    return sources, [batch.targets[0] for batch in batches if batch.targets is not None]


def write_pictures(path: Path, held_out: ImageDataset, columns: Mapping[str, Evaluation], noun: str) -> None:
    """A grid of the first prompts' pictures: a row per prompt, a column per entry of `columns` (by heading), with the
    source before and the target after them where there is one; under each picture what it earned. `noun`: what a prompt
    is called, said in the corner."""
    shown = min(len(column.images) for column in columns.values())
    sources, targets = images_of(held_out, shown)
    bare = [NO_CAPTION] * shown
    drawn = [(_heading(name, each, shown), each.images, _captions(each, shown)) for name, each in columns.items()]
    every: list[tuple[str, Pictures, list[Caption]]] = [("source", sources, bare), *drawn, ("target", targets, bare)]
    there = [column for column in every if len(column[1])]
    rows = [list(row) for row in zip(*(images[:shown] for _, images, _ in there), strict=True)]
    captions = [list(row) for row in zip(*(texts for _, _, texts in there), strict=True)]
    scored = any(caption.text for row in captions for caption in row)
    save_grid(
        path,
        rows,
        [example.prompt for example in held_out.examples[:shown]],
        [heading for heading, _, _ in there],
        counted(shown, noun),
        captions if scored else (),
        abreast=max(1, -(-shown // SHOWN_BELOW)),
    )


def _heading(name: str, evaluation: Evaluation, shown: int) -> str:
    """`name`, and how many of the first `shown` pictures are exactly right, where that is scored."""
    right = evaluation.shown.get(RIGHT)
    return name if right is None else f"{name}: {int((right[:shown] == 1).sum())} of {shown} {label(RIGHT)}"


def _captions(evaluation: Evaluation, shown: int) -> list[Caption]:
    """What each of the first `shown` pictures earned; empty where it was not scored."""
    nothing = torch.full((shown,), torch.nan)
    totals, right = (evaluation.shown.get(name, nothing)[:shown].tolist() for name in ("total", RIGHT))
    return [_caption(*scores) for scores in zip(totals, right, strict=True)]


def _caption(total: float, right: float) -> Caption:
    if right == 1:
        return Caption(label(RIGHT), good=True)
    return NO_CAPTION if math.isnan(total) else Caption(f"reward {number(total)}")


def scores_of(subjects: Subjects, step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    """A line of what was scored, and one of what was judged: what it is on, a digest of that, its prompts, and each
    figure per prompt, null where it does not apply."""
    lines = []
    for subject, figures in zip(subjects, (evaluation.scores, evaluation.judged), strict=True):
        scores = {
            name: [None if math.isnan(value) else round(value, 6) for value in values.tolist()]
            for name, values in figures.items()
        }
        if subject is not None and scores:
            lines.append(
                {
                    "step": step,
                    "on": f"{subject.name}s",
                    "digest": subject.digest[:DIGITS],
                    "prompts": subject.prompts,
                    "scores": scores,
                }
            )
    return lines


def told(subjects: Subjects, evaluation: Evaluation) -> list[str]:
    """A line for the terminal on what was scored, and one on what was judged."""
    lines, means = [], evaluation.means()
    alone = only_metric(evaluation)
    scores = [name for name in evaluation.scores if name in means and name != alone]
    judged = [name for name in evaluation.judged if name.endswith(("/loss", "/accuracy")) or "/" not in name]
    for subject, shown in zip(subjects, (scores, [name for name in judged if name in means]), strict=True):
        texts = [f"{score_label(name, alone)} {number(means[name])}" for name in shown]
        if texts:
            lines.append(f"{subject}: " + "  ".join(texts))
    return lines


def summary_row(name: str, before: Tensor, after: Tensor, higher_is_better: bool | None) -> list[str]:
    """Means of two evaluations [P] of the same things and their paired change, with its standard error over them, and
    whether that is better or worse, by the 95 % interval over them; NaN where a thing has no figure."""
    change = (after - before)[~(after - before).isnan()].double()
    error = change.std().item() / len(change) ** 0.5 if len(change) > 1 else None
    found = estimate(change.tolist())
    by = None if found is None else found.mean
    size = max(abs(by or 0.0), error or 0.0)
    digits = 3 if size >= 0.01 or size == 0 else 4 if size >= 0.001 else 5  # so that a small change is seen
    spec = f".{digits}f"
    return [
        name,
        number(_mean(before), spec),
        number(_mean(after), spec),
        number(by, f"+{spec}"),
        number(error, spec),
        "" if found is None or higher_is_better is None else _verdict(found, error, spec, higher_is_better),
    ]


def _mean(values: Tensor) -> float | None:
    return None if values.isnan().all() else values.double().nanmean().item()


def _verdict(change: Estimate, error: float | None, spec: str, higher_is_better: bool) -> str:
    if float(number(change.mean, spec)) == 0 and float(number(error or 0.0, spec)) == 0:
        return "same"
    if change.sign == 0:
        return "cannot be told"
    return "better" if (change.sign > 0) == higher_is_better else "worse"
