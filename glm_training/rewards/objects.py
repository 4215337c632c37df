"""Objects: which coloured shapes a picture has, and how they stand to each other, against the target's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import hypot

import numpy as np
import torch
from PIL import Image

from glm_training.rewards.options import ObjectsOptions
from glm_training.rewards.quoted_text import quoted_text
from glm_training.rewards.shapes import find_blobs
from glm_training.rewards.types import MetricScores, RewardBatch, to_pil
from glm_training.utils.hub_files import Wanted

PARTS = ("color", "shape", "relation", "number")
"""What is compared, in the order of the figures."""

NEARNESS = 0.1
"""What it is worth to stand where the target's object stands: it decides between objects that are alike, never against
a colour or a shape, which are worth 0.5 each."""


@dataclass(frozen=True)
class Seen:
    """An object of a picture: colour, shape ("" for none that is known), its centre as shares of the picture's width
    and height, and its area in pixels."""

    color: str
    shape: str
    x: float
    y: float
    area: int = 0


def objects_of(image: Image.Image) -> list[Seen]:
    """The coloured objects of an RGB picture; see `shapes`."""
    width, height = image.size
    return [
        Seen(blob.color, blob.shape, blob.x / width, blob.y / height, int(blob.mask.sum()))
        for blob in find_blobs(image)
    ]


def agreement(found: Sequence[Seen], wanted: Sequence[Seen], *, text: bool = False) -> dict[str, float]:
    """Parts in [0, 1] that apply to a target's objects `wanted` (one at least), 1 where the `found` ones agree.

    Each wanted object is paired with one found object, so that colours, shapes and then places agree best. "color",
    "shape": share of wanted objects whose pair has theirs, of those that have a known shape. "relation": share of pairs
    of wanted objects that differ whose pairs stand to each other the same way: left of, right of, above or below.
    "number": 1 - |found - wanted| / max(found, wanted). With `text`, which cuts holes into what it stands on, the
    colour of the largest object alone is compared.
    """
    if text:
        same = bool(found) and _largest(found).color == _largest(wanted).color
        return {"color": float(same)}
    pair = _paired(found, wanted)
    known = [i for i, one in enumerate(wanted) if one.shape]
    parts = {"color": sum(i in pair and pair[i].color == one.color for i, one in enumerate(wanted)) / len(wanted)}
    if known:
        parts["shape"] = sum(i in pair and pair[i].shape == wanted[i].shape for i in known) / len(known)
    differing = [(i, j) for i, j in combinations(range(len(wanted)), 2) if _differ(wanted[i], wanted[j])]
    if differing:
        holding = [{i, j} <= set(pair) and _stand_alike(wanted, pair, i, j) for i, j in differing]
        parts["relation"] = sum(holding) / len(differing)
    return parts | {"number": 1 - abs(len(found) - len(wanted)) / max(len(found), len(wanted))}


def _paired(found: Sequence[Seen], wanted: Sequence[Seen]) -> dict[int, Seen]:
    """The found object of each wanted one, by its place; not all have one."""
    from scipy.optimize import linear_sum_assignment

    def worth(one: Seen, other: Seen) -> float:
        apart = hypot(one.x - other.x, one.y - other.y) / 2**0.5
        return 0.5 * (one.color == other.color) + 0.5 * (one.shape == other.shape) - NEARNESS * apart

    table = np.array([[worth(one, other) for other in found] for one in wanted]).reshape(len(wanted), len(found))
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {int(i): found[int(j)] for i, j in zip(rows, columns, strict=True)}


def _differ(one: Seen, other: Seen) -> bool:
    return (one.color, one.shape) != (other.color, other.shape)


def _stand_alike(wanted: Sequence[Seen], pair: Mapping[int, Seen], i: int, j: int) -> bool:
    """Whether the pairs of two wanted objects stand to each other along the axis, and the way, that these do most."""
    dx, dy = wanted[j].x - wanted[i].x, wanted[j].y - wanted[i].y
    found_dx, found_dy = pair[j].x - pair[i].x, pair[j].y - pair[i].y
    if abs(dx) >= abs(dy):
        return bool(found_dx * np.sign(dx) > abs(found_dy))
    return bool(found_dy * np.sign(dy) > abs(found_dx))


def _largest(objects: Sequence[Seen]) -> Seen:
    return max(objects, key=lambda one: one.area)


class Objects:
    """Weighted mean of the parts that apply, in [0, 1]: 1 when all of them are right. See `agreement`."""

    needs = "a target image"

    def __init__(self, options: ObjectsOptions) -> None:
        self._weights = {part: getattr(options, part) for part in PARTS}

    def wanted(self) -> list[Wanted]:
        """Nothing."""
        return []

    def check(self) -> None:
        """Nothing to load."""

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """True when the sample has a target."""
        return has_target

    def score(self, batch: RewardBatch) -> MetricScores:
        """Objects of each image against those of its target; a target without objects that can be read is a failure."""
        assert batch.targets is not None  # applies() holds for every sample of the batch
        scores = MetricScores(torch.zeros(len(batch)))
        scores.parts = {part: torch.full((len(batch),), torch.nan) for part in PARTS}
        read: dict[bytes, list[Seen]] = {}  # a prompt's images share their target
        for row, (image, target) in enumerate(zip(to_pil(batch.images), to_pil(batch.targets), strict=True)):
            pixels = target.tobytes()
            if pixels not in read:
                read[pixels] = objects_of(target)
            text = bool(quoted_text(batch.prompts[row]))
            self._note(scores, row, agreement(objects_of(image), read[pixels], text=text) if read[pixels] else {})
        return scores

    def _note(self, scores: MetricScores, row: int, parts: Mapping[str, float]) -> None:
        weights = {part: self._weights[part] for part in parts}
        if not parts:
            scores.failures[row] = "its target shows no object in one of the colours that are read"
        elif not any(weights.values()):
            scores.failures[row] = f"reward.options.objects weighs none of {', '.join(parts)}, which apply to it"
        else:
            scores.values[row] = sum(weights[part] * value for part, value in parts.items()) / sum(weights.values())
            for part, value in parts.items():
                scores.parts[part][row] = value
