"""Which samples of reward training are kept to be looked at, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from glm_training.config import Config
from glm_training.config.sections.base import Part
from glm_training.reinforcement.credit import Scored
from glm_training.utils.distributed import World
from glm_training.utils.failures import beside_training
from glm_training.utils.kept_rollouts import ROLLOUTS, KeptRollout, RolloutFolder, Scores
from glm_training.utils.pictures import to_pil

LARGEST = 256
"""Longest side of a kept picture, in pixels."""
WHAT = "keeping pictures of rollouts"


class RolloutKeeper:
    """Keeps the first prompts of some steps: at first in memory, for a step may yet be dropped; on disk once it is
    whole. On the main process alone, of its own prompts. What fails here does not end the run."""

    def __init__(self, config: Config, world: World, total_steps: int) -> None:
        logging = config.logging
        self._config, self._total = config, total_steps
        self._interval, self._prompts = logging.rollout_every(), logging.rollout_prompts
        self._on = world.is_main and self._interval is not None
        self._folder = RolloutFolder(config.output_dir / ROLLOUTS, logging.rollout_mib << 20)
        self._pictures: list[Tensor] = []
        self._kept: KeptRollout | None = None

    def due(self, step: int) -> bool:
        """Whether samples of training step `step`, counted from 1, are kept."""
        if not self._on or self._interval is None:
            return False
        return step in (1, self._total) or step % self._interval == 0

    def keep(self, step: int, chunks: Sequence[Scored]) -> None:
        """Takes small copies to the CPU once the advantages are known, before the pictures go."""
        self._pictures, self._kept = [], None
        if self.due(step):
            with beside_training(WHAT):
                first = _first(chunks, self._prompts)
                for chunk, prompts in first:
                    images = chunk.rollout.images[: _rows(chunk, prompts)]
                    for group in images.split(len(images) // prompts):  # floats of all prompts would add up
                        self._pictures.append(_small(group))
                self._kept = kept_of(step, first, chunks, self._config)

    def write(self) -> None:
        """To disk, once the step is whole."""
        if self._kept is not None:
            with beside_training(WHAT):
                self._folder.write(self._kept, [_pil(image) for group in self._pictures for image in group])
        self._pictures, self._kept = [], None


def kept_of(step: int, first: Sequence[tuple[Scored, int]], chunks: Sequence[Scored], config: Config) -> KeptRollout:
    """What is said of the `first` prompts of each chunk."""
    scores: dict[str, Scores] = {"total": _joined(chunk.result.total[: _rows(chunk, count)] for chunk, count in first)}
    halves: tuple[Part, ...] = ("ar", "dit")
    for part in halves:
        own = config.reward_weights_for(part)
        if part in config.parts() and own is not None:
            totals = ((chunk.result.total_for(own), _rows(chunk, count)) for chunk, count in first)
            scores[f"{part}_total"] = _joined(values[:rows] for values, rows in totals)
    for name in dict.fromkeys(name for chunk, _ in first for name in chunk.result.components):
        scores[name] = _joined(_component(chunk, name)[: _rows(chunk, count)] for chunk, count in first)
    prompts = [prompt for chunk, count in first for prompt in chunk.rollout.prompts[:count]]
    plans, renders = config.group().plans, config.group().renders
    by_plan = (chunk.plan_advantages[: count * plans] for chunk, count in first)
    by_render = (chunk.render_advantages[: _rows(chunk, count)] for chunk, count in first)
    return KeptRollout(
        step,
        sum(len(chunk.rollout.prompts) for chunk in chunks),
        prompts,
        plans,
        renders,
        scores,
        _joined(by_plan) if "ar" in config.parts() else [],
        _joined(by_render) if "dit" in config.parts() else [],
    )


def _first(chunks: Sequence[Scored], count: int) -> list[tuple[Scored, int]]:
    """The chunks that the first `count` prompts of the step lie in, with how many of them each has."""
    found = []
    for chunk in chunks:
        taken = min(count, len(chunk.rollout.prompts))
        if taken:
            found.append((chunk, taken))
        count -= taken
    return found


def _component(chunk: Scored, name: str) -> Tensor:
    """A score of all samples; a metric that applies to none of them has no parts."""
    found = chunk.result.components.get(name)
    return torch.full_like(chunk.result.total, math.nan) if found is None else found


def _rows(chunk: Scored, prompts: int) -> int:
    return prompts * len(chunk.result.total) // len(chunk.rollout.prompts)


def _joined(parts: Iterable[Tensor]) -> Scores:
    values = torch.cat([part.float().cpu() for part in parts]).tolist()
    return [round(value, 6) if math.isfinite(value) else None for value in values]


def _small(images: Tensor) -> Tensor:
    """[n, 3, H, W] in [0, 1] as 8 bits on the CPU, at most LARGEST on a side; small ones as they are."""
    height, width = images.shape[-2:]
    scale = min(1.0, LARGEST / max(height, width))
    if scale < 1:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        images = functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return images.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def _pil(image: Tensor) -> Image.Image:
    return to_pil(image.float() / 255)
