"""The objects of a picture against the target's: parts by hand, through drawn pictures, and what is exactly right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from glm_training.rewards import (
    ObjectsOptions,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardOptions,
    RewardSampleError,
    score_batch,
)
from glm_training.rewards.objects import PARTS, Seen, agreement, objects_of
from glm_training.rewards.shapes import BACKGROUND, COLORS
from glm_training.rewards.types import exactly_right

RED_LEFT = [Seen("red", "circle", 0.25, 0.5), Seen("blue", "square", 0.75, 0.5)]


def drawn(*objects: tuple[str, str, int, int], size: int = 128) -> torch.Tensor:
    """[3, size, size] with (colour, shape, x, y), 40 px of 128 wide."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    canvas, scale = ImageDraw.Draw(image), size / 128
    for color, shape, x, y in objects:
        box = [(x - 20) * scale, (y - 20) * scale, (x + 20) * scale, (y + 20) * scale]
        if shape == "circle":
            canvas.ellipse(box, fill=COLORS[color])
        elif shape == "square":
            canvas.rectangle(box, fill=COLORS[color])
        else:
            canvas.polygon([(x * scale, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLORS[color])
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def seen(*objects: tuple[str, str, float, float]) -> list[Seen]:
    return [Seen(*one) for one in objects]


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (RED_LEFT, (1, 1, 1, 1)),
        (RED_LEFT[::-1], (1, 1, 1, 1)),
        # each other's colour: each pairs with what stands in its place
        (seen(("blue", "circle", 0.25, 0.5), ("red", "square", 0.75, 0.5)), (0, 1, 1, 1)),
        # exchanged places
        (seen(("red", "circle", 0.75, 0.5), ("blue", "square", 0.25, 0.5)), (1, 1, 0, 1)),
        # one above the other
        (seen(("red", "circle", 0.5, 0.2), ("blue", "square", 0.5, 0.8)), (1, 1, 0, 1)),
        # both red, one of them a triangle
        (seen(("red", "circle", 0.25, 0.5), ("red", "triangle", 0.75, 0.5)), (0.5, 0.5, 1, 1)),
        # one is missing; one too many; none
        (RED_LEFT[:1], (0.5, 0.5, 0, 0.5)),
        ([*RED_LEFT, Seen("black", "", 0.5, 0.9)], (1, 1, 1, 2 / 3)),
        ([], (0, 0, 0, 0)),
    ],
)
def test_parts_of_two_objects_by_hand(found, parts):
    assert agreement(found, RED_LEFT) == pytest.approx(dict(zip(PARTS, parts, strict=True)))


def test_objects_that_are_alike_stand_in_no_relation():
    wanted = [Seen("red", "circle", 0.25, 0.5), Seen("red", "circle", 0.75, 0.5)]
    assert agreement(wanted, wanted) == {"color": 1, "shape": 1, "number": 1}


def test_of_objects_that_are_alike_the_nearer_one_is_meant():
    wanted = [Seen("red", "circle", 0.2, 0.2), Seen("red", "circle", 0.8, 0.8), Seen("blue", "square", 0.8, 0.2)]
    assert agreement(wanted[::-1], wanted)["relation"] == 1


def test_an_object_of_no_known_shape_has_no_part_in_shapes():
    blot = [Seen("red", "", 0.5, 0.5)]
    assert agreement(blot, blot) == {"color": 1, "number": 1}


def test_where_text_stands_the_color_of_the_largest_object_is_compared():
    sign = [Seen("green", "", 0.5, 0.5, 5000), Seen("black", "", 0.5, 0.9, 300)]
    assert agreement([Seen("green", "square", 0.1, 0.1, 900)], sign, text=True) == {"color": 1.0}
    assert agreement([Seen("black", "square", 0.1, 0.1, 900)], sign, text=True) == {"color": 0.0}
    assert agreement([], sign, text=True) == {"color": 0.0}


@pytest.mark.parametrize("size", [128, 256])
def test_objects_are_read_from_pictures(size):
    pixels = (drawn(("red", "circle", 32, 64), ("yellow", "triangle", 96, 64), size=size) * 255).byte()
    found = objects_of(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert sorted((one.color, one.shape) for one in found) == [("red", "circle"), ("yellow", "triangle")]
    assert {one.color: round(one.x, 1) for one in found} == {"red": 0.3, "yellow": 0.8}


def test_the_score_is_the_weighted_mean_of_the_parts_and_tells_them():
    """Red circle, green square instead of a red circle left of a blue square: half the colours, all else."""
    target = drawn(("red", "circle", 32, 64), ("blue", "square", 96, 64))
    image = drawn(("red", "circle", 32, 64), ("green", "square", 96, 64))
    calculator = RewardCalculator({"objects": 1}, options=RewardOptions(objects=ObjectsOptions(color=3)))
    batch = RewardBatch(torch.stack([image, target]), ["a", "b"], torch.stack([target] * 2))
    result = score_batch(calculator, batch)  # as a trainer asks
    assert result.total.tolist() == pytest.approx([(3 * 0.5 + 3) / 6, 1])
    assert result.components["objects/color"].tolist() == [0.5, 1]
    assert [result.components[f"objects/{part}"][0] for part in ("shape", "relation", "number")] == [1, 1, 1]
    assert result.components["exactly_right"].tolist() == [0, 1]


def test_a_sign_has_no_shape_relation_or_number():
    sign = drawn(("red", "square", 64, 64))
    result = RewardCalculator({"objects": 1}).compute_rewards(RewardBatch(sign[None], ['a sign "A"'], sign[None]))
    assert result.components["objects/color"].tolist() == [1]
    assert all(result.components[f"objects/{part}"].isnan().all() for part in ("shape", "relation", "number"))


def test_a_target_of_another_size_is_compared_by_shares_of_its_sides():
    target = drawn(("red", "circle", 32, 64), ("blue", "square", 96, 64), size=256)
    image = drawn(("red", "circle", 32, 64), ("blue", "square", 96, 64))
    batch = RewardBatch(image[None], ["a"], target[None])
    assert RewardCalculator({"objects": 1}).compute_rewards(batch).total.tolist() == [1]


def test_a_target_without_objects_cannot_be_scored():
    blank = drawn()
    with pytest.raises(RewardSampleError, match="shows no object in one of the colours"):
        RewardCalculator({"objects": 1}).compute_rewards(RewardBatch(blank[None], ["a"], blank[None]))


def test_exactly_right_needs_every_metric_that_counts_and_applies():
    nan = math.nan
    components = {
        "objects": torch.tensor([1.0, 1.0, 0.9, 1.0, nan, 1.0]),
        "text_accuracy": torch.tensor([1.0, 0.5, 1.0, nan, nan, 1.0]),
        "aesthetic": torch.full((6,), 0.5),
    }
    right = exactly_right(components, {"objects": 1, "text_accuracy": 1, "aesthetic": 0})
    assert right is not None and right.nan_to_num(-1).tolist() == [1, 0, 0, 1, -1, 1]
    assert exactly_right(components, {"objects": 1, "aesthetic": 1}) is None


@pytest.mark.parametrize(
    "weights", [{"color": -1.0}, {"color": math.inf}, dict.fromkeys(("color", "shape", "relation", "number"), 0.0)]
)
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(RewardConfigError, match="reward.options.objects"):
        ObjectsOptions(**weights)
