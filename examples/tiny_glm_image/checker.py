"""A classical checker for the small world: does a picture show the shapes, colours, count and relation asked for?

It reads the prompt back into a `Scene` and compares it with what `glm_training.rewards.shapes` finds. Also a reward:
`examples/tiny_glm_image/checker.py:SceneReward`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from PIL import Image

from glm_training.rewards import RewardCalculator, quoted_text
from glm_training.rewards.shapes import Blob, find_blobs

sys.path.insert(0, str(Path(__file__).parent))
from world import COLORS, COUNTS, RELATIONS, SHAPES, Scene  # noqa: E402


def parse(prompt: str) -> Scene:
    """The scene that a prompt of the world asks for. Raises ValueError for other prompts."""
    words = quoted_text(prompt)
    color, shape = "|".join(COLORS), "|".join(SHAPES)
    if words and (match := re.match(rf"an? ({color}) sign", prompt)):
        return Scene(match[1], word=words[0])
    relation = rf"an? ({color}) ({shape}) ({'|'.join(RELATIONS)}) an? ({color}) ({shape})"
    if match := re.fullmatch(relation, prompt):
        return Scene(match[1], match[2], 1, match[3], match[4], match[5])
    numbers = {name: number for number, name in COUNTS.items()} | {"an": 1}
    if match := re.fullmatch(rf"({'|'.join(numbers)}) ({color}) ({shape})s?", prompt):
        return Scene(match[2], match[3], numbers[match[1]])
    raise ValueError(f"{prompt!r} is no prompt of the small world")


def scene_score(image: Image.Image, scene: Scene) -> float:
    """Share in [0, 1] of what was asked for that the picture shows; 1 only when all of it is right.

    For a sign, the colour of the board alone: OCR reads the word.
    """
    blobs = find_blobs(image)
    if scene.word:
        boards = [blob for blob in blobs if blob.color == scene.color]
        return float(bool(boards))
    if scene.relation:
        return _relation_score(blobs, scene)
    right = [blob for blob in blobs if (blob.color, blob.shape) == (scene.color, scene.shape)]
    colored = [blob for blob in blobs if blob.color == scene.color]
    missing = abs(len(colored) - scene.count) / scene.count
    score = 0.4 * max(0.0, 1 - missing) + 0.3 * min(len(right), scene.count) / scene.count
    return score + 0.3 * (len(blobs) == scene.count == len(colored))


def _relation_score(blobs: list[Blob], scene: Scene) -> float:
    first = [b for b in blobs if b.color == scene.color]
    second = [b for b in blobs if b.color == scene.other_color]
    score = 0.2 * (len(first) == 1) + 0.2 * (len(second) == 1)
    if len(first) != 1 or len(second) != 1:
        return score
    score += 0.2 * _relation_holds(blobs, scene) + 0.1 * (len(blobs) == 2)
    return score + 0.15 * (first[0].shape == scene.shape) + 0.15 * (second[0].shape == scene.other_shape)


def _relation_holds(blobs: list[Blob], scene: Scene) -> bool:
    """Whether the one object of the first colour stands to the one of the second as the prompt says."""
    first = [b for b in blobs if b.color == scene.color]
    second = [b for b in blobs if b.color == scene.other_color]
    if len(first) != 1 or len(second) != 1:
        return False
    dx, dy = second[0].x - first[0].x, second[0].y - first[0].y
    holds = {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}
    return holds[scene.relation]


def is_right(image: Image.Image, scene: Scene) -> bool:
    """Whether everything asked for is there (of a sign: the board's colour)."""
    return scene_score(image, scene) > 1 - 1e-6


def attributes(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """What of a scene of shapes is right, each on its own: "shape", "color" and "count" of all objects together, and
    for two objects the "relation" of the first colour to the second."""
    blobs = find_blobs(image)
    wanted = [(scene.color, scene.shape)] * scene.count
    if scene.relation:
        wanted.append((scene.other_color, scene.other_shape))
    found = {
        "shape": sorted(blob.shape for blob in blobs) == sorted(shape for _, shape in wanted),
        "color": {blob.color for blob in blobs} == {color for color, _ in wanted},
        "count": len(blobs) == len(wanted),
    }
    return found | ({"relation": _relation_holds(blobs, scene)} if scene.relation else {})


class SceneReward(RewardCalculator):
    """The checker's score as a reward, for prompts of the small world."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        return scene_score(generated_image, parse(prompt))
