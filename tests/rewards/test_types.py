"""Pictures on their way to and from 8 bits, samples taken out of a batch, and scores under other weights."""

from __future__ import annotations

import math

import pytest
import torch

from glm_training.rewards import RewardBatch, RewardResult
from glm_training.rewards.types import from_pil, to_pil, to_uint8

NAN = math.nan


def test_pixels_are_rounded_to_the_nearest_of_256_levels() -> None:
    """A rounding's way outside of [0, 1] is an edge, not a wrap-around."""
    levels = torch.tensor([0.0, 0.4, 0.6, 100.4, 100.6, 254.4, 254.6, 255.0, -0.1, 255.1]) / 255
    pixels = to_uint8(levels.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert pixels.shape == (1, 1, 10, 3)
    for channel in range(3):
        assert pixels[0, 0, :, channel].tolist() == [0, 0, 1, 100, 101, 254, 255, 255, 0, 255]


def test_a_pictures_rows_columns_and_colours_stay_where_they_are() -> None:
    images = torch.zeros(2, 3, 2, 3)
    images[1, 0, 0, 2], images[1, 1, 1, 0], images[1, 2, 1, 2] = 1.0, 0.2, 0.6
    blank, picture = to_pil(images)
    assert (picture.mode, picture.size, blank.getextrema()) == ("RGB", (3, 2), ((0, 0), (0, 0), (0, 0)))
    found = {(x, y): picture.getpixel((x, y)) for x in range(3) for y in range(2)}
    assert {place: colour for place, colour in found.items() if colour != (0, 0, 0)} == {
        (2, 0): (255, 0, 0),
        (0, 1): (0, 51, 0),
        (2, 1): (0, 0, 153),
    }
    torch.testing.assert_close(from_pil(picture), images[1:], rtol=0, atol=1e-7)


def test_selected_samples_keep_all_that_is_theirs() -> None:
    def pictures(first: float) -> torch.Tensor:
        return (torch.arange(3) / 10 + first).view(3, 1, 1, 1).expand(3, 3, 2, 2)

    batch = RewardBatch(pictures(0), ["a", "b", "c"], pictures(0.3), pictures(0.6), lambda: True)
    some = batch.select([2, 0])
    assert some.prompts == ["c", "a"] and len(some) == 2 and some.stopped()
    found = [images[:, 0, 0, 0].tolist() for images in (some.images, some.targets, some.sources)]
    assert found == [pytest.approx(row) for row in ([0.2, 0.0], [0.5, 0.3], [0.8, 0.6])]
    bare = RewardBatch(pictures(0), ["a", "b", "c"]).select([1])
    assert bare.targets is None and bare.sources is None and not bare.stopped()


def test_the_same_scores_under_other_weights() -> None:
    """Metrics by the name that the configuration writes; what was left out has no total under any weights."""
    components = {"a": torch.tensor([0.2, 0.4, 0.9]), "Own": torch.tensor([0.6, NAN, 0.1])}
    result = RewardResult(torch.zeros(3), components, {2: "why"}, {"a": "a", "own.py:Own": "Own"})
    total = result.total_for({"a": 1, "own.py:Own": 3})
    assert total.tolist()[:2] == pytest.approx([(0.2 + 3 * 0.6) / 4, 0.4]) and total[2].isnan()
    assert result.total_for({"own.py:Own": 3}).isnan().tolist() == [False, True, True], "nothing of it applies to all"
    assert result.by_name({"a": 1, "own.py:Own": 3}) == {"a": 1, "Own": 3} and result.skipped == 1


def test_means_are_of_the_samples_that_have_a_score() -> None:
    components = {"a": torch.tensor([0.25, NAN, 0.75]), "none": torch.full((3,), NAN)}
    assert RewardResult(torch.tensor([NAN, 0.5, 1.0]), components).means() == {"total": 0.75, "a": 0.5}
