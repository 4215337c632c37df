"""Samples of a training step that a run keeps: small pictures, with what was thought of each.

A step is a folder, `rollouts/step-000100`: `rollout.json` and a JPEG `<prompt>-<plan>-<render>.jpg` per sample.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

from PIL import Image

from glm_training.utils.step_folders import discarded, step_folder, step_folders

ROLLOUTS, CONTENT = "rollouts", "rollout.json"
QUALITY = 85
"""Of the JPEGs."""

Scores = list[float | None]


@dataclass(frozen=True)
class KeptRollout:
    """P prompts of training step `step`, N `plans` of each and M `renders` of each plan, rows in that order.

    scores: figure -> [P*N*M], None where it does not apply. plan_advantages [P*N], render_advantages [P*N*M]: empty
    where the half is not trained. of: prompts that the step had in all.
    """

    step: int
    of: int
    prompts: list[str]
    plans: int
    renders: int
    scores: dict[str, Scores]
    plan_advantages: Scores
    render_advantages: Scores

    @property
    def names(self) -> list[str]:
        """The file of each row."""
        return [
            f"{prompt}-{plan}-{render}.jpg"
            for prompt in range(len(self.prompts))
            for plan in range(self.plans)
            for render in range(self.renders)
        ]

    @staticmethod
    def read(folder: Path) -> KeptRollout:
        """Raises ValueError for what is none, and OSError."""
        content = json.loads((folder / CONTENT).read_bytes())
        try:
            kept = KeptRollout(**{field.name: content[field.name] for field in fields(KeptRollout)})
            rows = len(kept.names)
            whole = all(len(values) == rows for values in kept.scores.values())
            plans, renders = len(kept.plan_advantages), len(kept.render_advantages)
            whole = whole and plans in (0, len(kept.prompts) * kept.plans) and renders in (0, rows)
            values = [*kept.plan_advantages, *kept.render_advantages, *chain.from_iterable(kept.scores.values())]
            whole = whole and isinstance(kept.step, int) and all(isinstance(prompt, str) for prompt in kept.prompts)
            whole = whole and isinstance(kept.of, int) and all(map(_is_value, values))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{CONTENT} is none of a run's: {error!r}") from error
        if not whole:
            raise ValueError(f"{CONTENT} has not one finite value for each of its {rows} samples")
        return kept


def _is_value(value: object) -> bool:
    """A finite number, or nothing."""
    return value is None or (isinstance(value, int | float) and abs(value) <= 1e300)


class RolloutFolder:
    """The kept steps of a run, of at most `limit` bytes together with those that were discarded."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit

    def write(self, kept: KeptRollout, pictures: Sequence[Image.Image]) -> None:
        """Adds a step, whole or not at all, in the place of an earlier one of the same number; then removes steps until
        all take no more than the limit, first those that were discarded. Raises OSError."""
        folder = step_folder(self.root, kept.step)
        for torn in self.root.glob(".step-*.new"):  # of a write that was killed
            shutil.rmtree(torn)
        fresh = folder.with_name(f".{folder.name}.new")
        fresh.mkdir(parents=True)
        for name, picture in zip(kept.names, pictures, strict=True):
            picture.save(fresh / name, quality=QUALITY)
        text = json.dumps(asdict(kept), ensure_ascii=False, allow_nan=False)
        (fresh / CONTENT).write_bytes(text.encode("utf-8", "backslashreplace"))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(fresh, folder)
        self._make_room()

    def _make_room(self) -> None:
        old = [path for path in discarded(self.root).glob("step-*") if path.is_dir()]
        old.sort(key=lambda path: path.stat().st_mtime_ns)
        folders = dict(step_folders(self.root))
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in (*old, *folders.values())}
        while sum(sizes.values()) > self.limit:
            path = old.pop(0) if old else folders.pop(least_missed(sorted(folders)))
            shutil.rmtree(path)
            del sizes[path]


def least_missed(steps: Sequence[int]) -> int:
    """Which of the ascending `steps` goes first: the one between the two nearest neighbours; of two the earlier, so
    that the newest goes last."""
    inner = range(1, len(steps) - 1)
    if not inner:
        return steps[0]
    return steps[min(inner, key=lambda place: steps[place + 1] - steps[place - 1])]
