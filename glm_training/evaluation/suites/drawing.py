"""Pictures of a benchmark from a model: who draws, and what decides what is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from glm_training.evaluation.suites.protocol import EvaluationError, Maker, Picture
from glm_training.models.family import Family, Sampling
from glm_training.models.prompt_reading import shortened
from glm_training.utils.pictures import to_pil

MOST_SAMPLES = 10_000
"""Samples of a prompt; what keeps the names of two prompts' draws apart."""

_LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class Drawing:
    """How a model draws: pixels, seed, and the numbers of the sampling."""

    height: int
    width: int
    seed: int
    sampling: Sampling

    def settings(self) -> dict[str, Any]:
        """As they stand in the settings file."""
        return asdict(self)


def drawer(family: Family, drawing: Drawing) -> Maker:
    """Draws sample n of prompt i from noise that (seed, i, n) alone decide; several samples of a picture are tiled row
    by row in a square."""

    def make(pictures: Sequence[Picture]) -> list[Image.Image]:
        rows = [(picture, sample) for picture in pictures for sample in picture.samples]
        drawn = family.draw(
            [picture.prompt for picture, _ in rows],
            height=drawing.height,
            width=drawing.width,
            seed=drawing.seed,
            sampling=drawing.sampling,
            prompt_ids=[picture.index * MOST_SAMPLES + sample for picture, sample in rows],
            micro_batch_size=len(rows),
        )
        images = iter([to_pil(image) for image in drawn])
        return [tiled([next(images) for _ in picture.samples]) for picture in pictures]

    return make


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """n^2 pictures of one size as a square of n by n, row by row. Raises ValueError for another number of them."""
    side = round(len(images) ** 0.5)
    if side * side != len(images):
        raise ValueError(f"{len(images)} pictures are no square")
    width, height = images[0].size
    grid = Image.new("RGB", (side * width, side * height))
    for place, image in enumerate(images):
        grid.paste(image, (place % side * width, place // side * height))
    return grid


def tiles(image: Image.Image, side: int = 2) -> list[Image.Image]:
    """The `side` x `side` tiles of a grid, row by row. Raises ValueError where they are not of one size."""
    width, height = image.width // side, image.height // side
    if (width * side, height * side) != image.size or not width or not height:
        raise ValueError(f"a picture of {image.width} x {image.height} px is no grid of {side} x {side} tiles")
    corners = [(column * width, row * height) for row in range(side) for column in range(side)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]


def check_prompts(family: Family, pictures: Sequence[Picture], drawing: Drawing) -> list[str]:
    """What the model does not read of the prompts, a note each. Raises EvaluationError, naming every prompt that it
    cannot draw at all."""
    prompts = list(dict.fromkeys(picture.prompt for picture in pictures))
    readings = family.read_prompts(prompts, drawing.height, drawing.width, "t2i")
    faults = [
        f"  {shortened(prompt)!r}: {'. '.join(reading.fault)}"
        for prompt, reading in zip(prompts, readings, strict=True)
        if reading.fault is not None
    ]
    if faults:
        raise EvaluationError("\n".join(["the model cannot draw these prompts:", *faults[:20]]))
    return [
        f"{shortened(prompt)!r}: {reading.cut}"
        for prompt, reading in zip(prompts, readings, strict=True)
        if reading.cut is not None
    ]


def fingerprint(folder: Path) -> str | None:
    """Changes with the weights below `folder`: of every file the name, the size, and 64 kB at the start, the middle and
    the end. None where there is no folder (a hub id)."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size};".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - _LOOKED_AT)):
                file.seek(start)
                digest.update(file.read(_LOOKED_AT))
    return digest.hexdigest()[:16]
