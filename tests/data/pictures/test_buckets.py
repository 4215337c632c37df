"""Sizes by closed form, and what holds for every shape and budget."""

from __future__ import annotations

from itertools import product

import pytest

from glm_training.data.pictures.buckets import Buckets


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1024, 1024), (1024, 1024)),  # as it is
        ((3000, 3000), (1024, 1024)),  # down to the budget
        ((1000, 1000), (992, 992)),  # never up: the multiple below
        ((4000, 6000), (832, 1248)),  # 2 : 3 exactly: 836 x 1254 have 1024^2 px
        ((6000, 4000), (1248, 832)),  # turned
        ((1080, 1920), (768, 1344)),  # 0.7 of it in the width; 736 x 1344 would hold less, 800 x 1408 is too large
        ((500, 2000), (512 - 32, 1920)),  # 480 x 1920 is 1 : 4
        ((100, 1000), (96, 960)),  # a small long one keeps its shape
        ((64, 64), (64, 64)),
        ((70, 64), (64, 64)),
        ((63, 500), None),  # no side below the smallest bucket's
        ((500, 63), None),
    ],
)
def test_sizes_of_glm_image_at_1024(shape, size) -> None:
    assert Buckets(1024 * 1024, 32).size(shape) == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4000, 6000), (832, 1216)),
        ((3000, 4000), (896, 1152)),
        ((1000, 1000), (960, 960)),
        ((9000, 16000), (768, 1344)),
    ],
)
def test_sizes_of_sdxl(shape, size) -> None:
    """Multiples of 64. All four stand in the table of sizes that SDXL was trained on but the small one."""
    assert Buckets(1024 * 1024, 64).size(shape) == size


def test_shapes_longer_than_the_smallest_side_allows_are_cut() -> None:
    """128^2 px with sides of 64 and more: 1 : 4 is the longest."""
    assert Buckets(128 * 128, 32).size((300, 3000)) == (64, 256)
    assert Buckets(128 * 128, 32, smallest=32).size((300, 3000)) == (32, 320)


def test_enlarging_is_asked_for() -> None:
    assert Buckets(256 * 256, 32, upscale=True).size((20, 30)) == (192, 288)  # 209 x 313 have 256^2 px
    assert Buckets(256 * 256, 32).size((20, 30)) is None
    assert Buckets(256 * 256, 32, upscale=True).size((2000, 3000)) == Buckets(256 * 256, 32).size((2000, 3000))


def test_what_goes_with_a_picture_is_not_enlarged_either() -> None:
    buckets = Buckets(1024 * 1024, 32)
    assert buckets.size((1024, 1024), (512, 512)) == (512, 512)
    assert buckets.size((1024, 1024), (2000, 700)) == (672, 672)
    assert buckets.size((1024, 1024), (40, 2000)) is None
    assert Buckets(1024 * 1024, 32, upscale=True).size((1024, 1024), (512, 512)) == (1024, 1024)


@pytest.mark.parametrize(
    ("area", "multiple", "smallest"), [(128 * 128, 32, 64), (300 * 500, 64, 128), (64 * 64, 32, 32)]
)
def test_every_shape_has_the_best_size_there_is(area, multiple, smallest) -> None:
    """Against all sizes, tried one by one: budget, multiples, smallest side, nothing enlarged, and no other size that
    holds a larger whole copy, or as large a one with less to cut."""
    every = [
        (height, width)
        for height, width in product(range(smallest, area // smallest + 1, multiple), repeat=2)
        if height * width <= area
    ]
    buckets = Buckets(area, multiple, smallest)
    sides = [*range(40, 700, 53), 64, 128, 1111]
    for h, w in product(sides, repeat=2):
        fitting = [(height, width) for height, width in every if height <= h and width <= w]
        size = buckets.size((h, w))
        if not fitting:
            assert size is None and min(h, w) < smallest
            continue
        assert size in fitting
        # cross-multiplied by h w, so that equal ones compare as equal
        best = max((min(height * w, width * h), -height * width) for height, width in fitting)
        assert best == (min(size[0] * w, size[1] * h), -size[0] * size[1])


def test_less_than_a_multiple_is_left_free_by_a_whole_copy() -> None:
    buckets = Buckets(1024 * 1024, 32)
    for h, w in product(range(100, 3000, 171), range(100, 3000, 131)):
        size = buckets.size((h, w))
        assert size is not None
        scale = min(size[0] / h, size[1] / w)
        longest = max(h, w) / min(h, w) > 1024 * 1024 / 64 / 64
        assert longest or (size[0] - h * scale < 32 and size[1] - w * scale < 32), (h, w)


@pytest.mark.parametrize(("area", "multiple", "smallest"), [(64 * 64, 32, 96), (64 * 64, 64, 32), (10**6, 64, 96)])
def test_buckets_that_cannot_be(area, multiple, smallest) -> None:
    with pytest.raises(ValueError, match="cannot begin"):
        Buckets(area, multiple, smallest)
