"""Coloured shapes in a picture, found without a model: the tiny world's palette, connected pixels, and how much of its
bounding box a shape fills."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

COLORS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (244, 202, 22),
    "purple": (142, 52, 180), "black": (24, 24, 24),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
BACKGROUND = (238, 238, 234)

MIN_AREA = 150
"""Pixels; smaller blobs are specks."""
TOLERANCE = 75.0
"""Largest RGB distance of a pixel from the colour it is counted as."""
FILL = {"square": (0.87, 1.0), "circle": (0.70, 0.86), "triangle": (0.40, 0.63)}
"""Share of its bounding box that a shape fills, with room for imperfect edges."""


@dataclass(frozen=True)
class Blob:
    """A found object: its colour, shape ("" when it is none of them), centre in pixels, box (x0, y0, x1, y1) in pixels,
    ends excluded, and its pixels [H, W]."""

    color: str
    shape: str
    x: float
    y: float
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    mask: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool), repr=False, compare=False)


def find_blobs(image: Image.Image) -> list[Blob]:
    """Coloured objects of a picture, specks left out."""
    from scipy import ndimage

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.array([*COLORS.values(), BACKGROUND], dtype=np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    label = distance.argmin(-1)
    label[distance.min(-1) > TOLERANCE] = len(COLORS)
    blobs = []
    for index, color in enumerate(COLORS):
        found, _ = ndimage.label(ndimage.binary_opening(label == index, iterations=1))
        for number, place in enumerate(ndimage.find_objects(found), start=1):
            own = found[place] == number
            if own.sum() < MIN_AREA:
                continue
            fill = own.mean()
            shape = next((name for name, (low, high) in FILL.items() if low <= fill <= high), "")
            rows, columns = place
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            mask = np.zeros(label.shape, dtype=bool)
            mask[place] = own
            blobs.append(Blob(color, shape, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box, mask))
    return blobs
