"""What evaluations leave behind: scores per prompt, and at the end the before/after table and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from glm_training.config import Config
from glm_training.data import ImageDataset
from glm_training.evaluation.held_out import Evaluation
from glm_training.utils.console import Console
from glm_training.utils.distributed import World
from glm_training.utils.failures import beside_training
from glm_training.utils.pictures import save_grid

EVALUATIONS = "evaluations.jsonl"
"""File of a run with a line per evaluation."""


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


def outline(config: Config, world: World, prompts: int, steps: int) -> str:
    """One line on what a run trains: `prompts` (or pairs) in the data, `steps` of the whole run."""
    halves = " and ".join({"ar": "AR", "dit": "DiT", "unet": "UNet"}[part] for part in config.parts())
    noun = "" if config.parts() == ("unet",) else " halves" if len(config.parts()) > 1 else " half"
    what = "pairs" if config.training.method == "dpo" else "prompts"
    adapters = " (LoRA adapters)" if any(config.lora_for(part).enabled for part in config.parts()) else ""
    at_once = config.training.batch_size * config.training.gradient_accumulation_steps * world.world_size
    batch = f"{at_once} {what}" if at_once > 1 else f"1 {what[:-1]}"
    if config.uses_reward():
        batch += f" x {config.reward.grpo.num_samples} images"
    place = str(world.device) if world.world_size == 1 else f"{world.world_size} processes"
    return (
        f"training the {halves}{noun}{adapters} of {config.model.name} on {prompts} {what}: "
        f"{steps} steps of {batch}, on {place}"
    )


def write_summary(
    console: Console,
    config: Config,
    held_out: ImageDataset,
    before: Evaluation,
    after: Evaluation,
    before_step: int,
) -> None:
    """Prints held-out scores before and after, and saves the first prompts' pictures side by side.

    `before_step`: where `before` was taken, in a resumed run perhaps not at the start; the headings then say so.
    """
    earlier = "before" if before_step == 0 else f"step {before_step}"
    with beside_training("the table of scores before and after"):
        rows = [summary_row(name, before, after) for name in after.means()]
        count = len(held_out)
        title = f"Held-out scores, {count} prompts x {config.evaluation.samples_per_prompt} samples"
        console.table(title, ["score", earlier, "after", "change", "standard error"], rows)
    with beside_training("writing the picture of before and after"):
        path = config.output_dir / "samples" / "before_after.png"
        write_pictures(path, held_out, {earlier: before.images, "after": after.images})
        console.line(f"pictures before and after: {path}")


def write_pictures(path: Path, held_out: ImageDataset, columns: Mapping[str, Tensor]) -> None:
    """A grid of the first prompts' pictures: a row per prompt, a column per entry of `columns` ([n, 3, H, W] in [0, 1],
    by heading), with the source before and the target after them where there is one."""
    shown = min(len(images) for images in columns.values())
    batch = held_out.batch(range(shown))
    sources = {} if batch.sources is None else {"source": batch.sources}
    targets = {} if batch.targets is None else {"target": batch.targets}
    every = {**sources, **columns, **targets}
    rows = [list(row) for row in zip(*(images[:shown] for images in every.values()), strict=True)]
    save_grid(path, rows, [example.prompt for example in held_out.examples[:shown]], list(every))


def scores_of(step: int, held_out: ImageDataset, evaluation: Evaluation) -> dict[str, Any]:
    """The line of an evaluation: prompts, and each metric's score per prompt, null where it does not apply."""
    scores = {
        name: [None if math.isnan(value) else round(value, 6) for value in values.tolist()]
        for name, values in evaluation.scores.items()
    }
    return {"step": step, "prompts": [example.prompt for example in held_out.examples], "scores": scores}


def summary_row(name: str, before: Evaluation, after: Evaluation) -> list[str]:
    """Means and their paired change; the standard error is that of the change over prompts."""
    change = after.scores[name] - before.scores[name]
    change = change[~change.isnan()]
    error = change.std().item() / len(change) ** 0.5 if len(change) > 1 else float("nan")
    label = "reward" if name == "total" else name
    return [
        label,
        f"{before.means()[name]:.3f}",
        f"{after.means()[name]:.3f}",
        f"{change.mean().item():+.3f}",
        f"{error:.3f}",
    ]
