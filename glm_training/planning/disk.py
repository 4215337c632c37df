"""What a run's checkpoints take of the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from glm_training.config import Config
from glm_training.planning.counting import moment_bytes
from glm_training.planning.memory import Memory
from glm_training.planning.passes import WIDE


@dataclass(frozen=True)
class Disk:
    """Bytes of a checkpoint by what it holds, how many there are at most while one is written, the best included (None:
    as many as are saved), and what is free where they go."""

    items: dict[str, float]
    held: int | None
    free: int
    folder: Path

    @property
    def each(self) -> float:
        """Bytes of a checkpoint."""
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for those that are held, or without a limit for two."""
        return self.each * (self.held or 2) <= self.free


def checkpoints(config: Config, memory: Memory) -> Disk:
    """A checkpoint: trained weights in fp32; with `save_optimizer` moments and slow copies; the whole pipeline, merged,
    unless `save_lora_only`; adapters once more in the format of the libraries."""
    settings = config.checkpoint
    items = {"trained weights": 0.0, "optimizer": 0.0, "slow copies": 0.0, "adapters": 0.0}
    adapted = False
    for part in memory.parts:
        if not part.trained:
            continue
        half = memory.halves[part.name]
        size = WIDE * part.trained_count
        items["trained weights"] += size
        if settings.save_optimizer:
            items["optimizer"] += moment_bytes(half.rule, part.trained)
        items["slow copies"] += size * sum(name != "reference" for name in half.copies)
        if half.lora.enabled:
            adapted |= part.saved
            items["adapters"] += size
    if not (adapted and settings.save_lora_only):
        whole = {name for name, half in memory.halves.items() if not half.lora.enabled}
        items["pipeline"] = float(
            sum(
                part.total * (WIDE if part.name in whole else memory.size_of(part))
                for part in memory.parts
                if part.saved
            )
        )
    folder = config.checkpoint_dir().absolute()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    limit = settings.save_total_limit
    best = config.checkpoint.keep_best and config.evaluation.enabled
    held = None if limit is None else limit + 1 + best
    kept = {name: size for name, size in items.items() if size}
    return Disk(kept, held, shutil.disk_usage(there).free, config.checkpoint_dir())
