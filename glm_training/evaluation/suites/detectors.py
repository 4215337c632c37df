"""What finds objects in pictures, behind one interface, and what tells the colour of an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.rewards.shapes import COLORS as WORLD_COLORS
from glm_training.rewards.shapes import SHAPES, find_blobs

RECORDED_FROM = 0.1
"""Detections of a lower score are not recorded; the rules begin at .3."""


@dataclass(frozen=True)
class Detected:
    """An object: its class as the prompts call it, its score in [0, 1], its box (x0, y0, x1, y1) in pixels, and which
    pixels [H, W] are its own, None where the detector does not tell."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects. `name` stands beside every figure."""

    @property
    def name(self) -> str: ...

    def check(self, classes: Sequence[str]) -> None:
        """Raises EvaluationError where it cannot be used or does not know one of the `classes`; loads little."""

    def detect(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Detected] | Failure]:
        """What it finds of the `classes` in each picture."""


class ColorJudge(Protocol):
    """Tells colours of objects."""

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Raises EvaluationError where it cannot be used."""

    def colors(self, image: Image.Image, objects: Sequence[tuple[Detected, str]]) -> list[Mapping[str, float]]:
        """Colour -> probability, for each object and its class."""


class ShapesDetector:
    """The classical checker of the tiny world: connected pixels of a colour, whose shape is told by how much of its box
    they fill. Sure of all it finds; larger objects come first."""

    name = "shapes"

    def check(self, classes: Sequence[str]) -> None:
        unknown = [name for name in classes if name not in SHAPES]
        if unknown:
            raise EvaluationError(
                f"the detector shapes finds {', '.join(SHAPES)}; the prompts ask for {', '.join(unknown[:10])}. It "
                "is for the tiny world: give --detector transformers:MODEL or http://... for other prompts"
            )

    def detect(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Detected] | Failure]:
        return [
            [
                Detected(blob.shape, 1.0, blob.box, blob.mask)
                for blob in sorted(find_blobs(image), key=lambda blob: -int(blob.mask.sum()))
                if blob.shape in classes
            ]
            for image in images
        ]


class ShapesColors:
    """The colour of the tiny world's palette that is nearest to an object's mean, with probability 1."""

    name = "shapes"

    def check(self) -> None:
        """Nothing is needed."""

    def colors(self, image: Image.Image, objects: Sequence[tuple[Detected, str]]) -> list[Mapping[str, float]]:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
        found: list[Mapping[str, float]] = []
        for detected, _ in objects:
            mask = detected.mask if detected.mask is not None else box_mask(detected.box, image.size)
            mean = pixels[mask].mean(axis=0) if mask.any() else np.zeros(3)
            distances = {name: float(np.linalg.norm(mean - value)) for name, value in WORLD_COLORS.items()}
            found.append({min(distances, key=lambda name: distances[name]): 1.0})
        return found


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """[H, W] of the pixels in a box of a picture of `size` (width, height)."""
    left, top, right, bottom = whole_box(box, size)
    mask = np.zeros((size[1], size[0]), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def whole_box(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels of a box, rounded as Pillow's crop rounds, at least one, inside the picture of `size`."""
    left, top, right, bottom = (round(side) for side in box)
    left, top = min(max(left, 0), size[0] - 1), min(max(top, 0), size[1] - 1)
    return left, top, min(max(right, left + 1), size[0]), min(max(bottom, top + 1), size[1])


def recorded(detected: Detected, colors: Mapping[str, float] | None) -> dict[str, Any]:
    """As the rules read it; its mask is not kept."""
    record: dict[str, Any] = {
        "class": detected.name,
        "score": round(detected.score, 6),
        "box": [round(float(side), 3) for side in detected.box],
    }
    return record | ({} if colors is None else {"colors": {name: round(p, 6) for name, p in colors.items()}})
