"""Pictures on the page: small, and no more of them than the page should hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from glm_training.report.run import Run, Sampled
from glm_training.utils.kept_rollouts import ROLLOUTS, KeptRollout
from glm_training.utils.step_folders import step_folders

LARGEST, QUALITY = 256, 82
SAMPLES, SAMPLE_BYTES = 400, 9 << 20
"""Sample pictures on a page, of all runs, and what they may take."""
ROLLOUT_BYTES = 9 << 20
PROMPTS = 24
"""Of a step of samples."""
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or only half of one."""

T = TypeVar("T")


@dataclass
class Album:
    """The pictures of a page, as base64 of JPEGs; others name them by their places. A place of -1 is no picture."""

    pictures: list[str] = field(default_factory=list)

    def add(self, jpeg: bytes | None) -> int:
        """Its place."""
        if jpeg is None:
            return -1
        self.pictures.append(base64.b64encode(jpeg).decode("ascii"))
        return len(self.pictures) - 1


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, evenly over the whole, the first and the last among them."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[-1:]) if count == 1 else []
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def small(path: Path) -> bytes | None:
    """The picture as a small JPEG; None where there is none to be read."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
            picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    except _BROKEN:
        return None
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def samples_of(run: Run, runs: int, album: Album) -> tuple[list[dict[str, Any]], str]:
    """The samples of a run among `runs` on the page: a step, and a picture for each prompt; and what is not shown."""
    if not run.samples:
        return [], ""
    most = max(len(sampled.files) for sampled in run.samples)
    prompts = min(most, PROMPTS)
    chosen = spread(run.samples, max(2, SAMPLES // runs // prompts))
    jpegs = {sampled.step: [small(path) for path in sampled.files[:prompts]] for sampled in chosen}
    sizes = {step: sum(len(jpeg) for jpeg in found if jpeg is not None) for step, found in jpegs.items()}
    chosen = within(chosen, lambda sampled: sizes[sampled.step], SAMPLE_BYTES // runs)
    steps = [{"step": each.step, "pictures": [album.add(jpeg) for jpeg in jpegs[each.step]]} for each in chosen]
    told = []
    if len(chosen) < len(run.samples):
        told.append(f"{len(chosen)} of {len(run.samples)} steps")
    if prompts < most:
        told.append(f"the first {prompts} of {most} prompts")
    return steps, f"Shown: {' and '.join(told)}; all pictures are in samples/ of the run." if told else ""


def prompts_of(samples: Sequence[Sampled]) -> list[str]:
    """What the pictures are of, by the newest step."""
    return samples[-1].prompts[:PROMPTS] if samples else []


def rollouts_of(run: Run, runs: int, album: Album) -> tuple[list[tuple[KeptRollout, list[int]]], str]:
    """The kept steps of a run among `runs` on the page with the place of each sample's picture; what is not shown."""
    found: list[tuple[KeptRollout, Path]] = []
    for step, folder in step_folders(run.folder / ROLLOUTS):
        try:
            if not run.figures or step <= run.step:
                found.append((KeptRollout.read(folder), folder))
        except (OSError, ValueError) as error:
            run.problems.append(f"{folder.name} of {ROLLOUTS}: {error}")
    chosen = within(found, lambda each: _size(each[1]), ROLLOUT_BYTES // runs)
    shown = [(kept, [album.add(_read(folder / name)) for name in kept.names]) for kept, folder in chosen]
    told = f"Shown: {len(chosen)} of {len(found)} kept steps; all are in {ROLLOUTS}/ of the run."
    return shown, told if len(chosen) < len(found) else ""


def within(items: Sequence[T], size: Callable[[T], int], limit: int) -> list[T]:
    """As many of the items, evenly over the whole, as take no more than the limit together."""
    count = len(items)
    while count and sum(size(item) for item in spread(items, count)) > limit:
        count -= 1
    return spread(items, count)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.jpg"))


def _read(path: Path) -> bytes | None:
    """The file as it is: it is small already. None where it is no whole JPEG."""
    try:
        with Image.open(path) as image:
            if image.format != "JPEG":
                return None
            image.load()
        return path.read_bytes()
    except _BROKEN:
        return None
