"""Sizes of pictures in training as their own shapes ask for them: aspect-ratio buckets.

Legend: h, w a picture's sides in px; H, W those of its bucket, multiples of M (32 px for GLM-Image, one prior token; 64
for SDXL, so that its UNet halves them evenly); A the area budget in px.

Of all sizes with H W <= A, H <= h and W <= w (nothing is enlarged, unless asked), and H, W >= the smallest side, a
picture gets the one that holds the largest whole copy of it: the largest min(H / h, W / w), and of several with that
the one with the fewest pixels. It is then resized to cover H x W, by max(H / h, W / w), and the overhang is cut. A
whole copy would leave less than M px of the bucket free, so little is cut, but of shapes so long that the smallest side
does not allow them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Buckets:
    """How sizes are chosen.

    Attributes:
        area: pixels that a bucket has at most.
        multiple: of which both sides of a bucket are multiples.
        smallest: the least side of a bucket, a multiple of `multiple`; smallest * smallest <= area.
        upscale: whether pictures may be enlarged; then each gets the largest size within the area.
    """

    area: int
    multiple: int
    smallest: int = 64
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.smallest % self.multiple or self.smallest < self.multiple or self.smallest**2 > self.area:
            raise ValueError(
                f"buckets of at most {self.area} px in multiples of {self.multiple} cannot begin at {self.smallest}"
            )

    def size(self, shape: Size, *others: Size) -> Size | None:
        """The bucket of a picture of `shape` (height, width), so that `others` need not be enlarged for it either; None
        where a side of any is below the smallest one."""
        sides = [min(side) for side in zip(shape, *others, strict=True)]
        return _bucket(self, *shape, *((self.area, self.area) if self.upscale else sides))

    def why_none(self, shape: Size) -> tuple[str, str]:
        """What is wrong with a picture that has no bucket, and what to do."""
        reason = f"has {shape[1]} x {shape[0]} pixels, and the smallest bucket is {self.smallest} x {self.smallest}"
        return reason, "Replace it, lower data.buckets.smallest, or set data.buckets.upscale: true"


@lru_cache(maxsize=1 << 16)
def _bucket(buckets: Buckets, h: int, w: int, highest: int, widest: int) -> Size | None:
    """The bucket of shape h x w, with sides of at most `highest` and `widest`."""
    step, smallest = buckets.multiple, buckets.smallest
    most = buckets.area // smallest
    best: tuple[Fraction, Size] | None = None
    # the largest whole copy touches the bucket at one side at least: each multiple is tried as that side, with the
    # least other side, so that of two buckets none holds as large a copy as the other
    for side in range(smallest, most + 1, step):
        tall = side, max(smallest, _up(side * w, h, step))
        wide = max(smallest, _up(side * h, w, step)), side
        for height, width in (tall, wide):
            if height <= highest and width <= widest and height * width <= buckets.area:
                found = min(Fraction(height, h), Fraction(width, w)), (height, width)
                best = found if best is None else max(best, found)
    return None if best is None else best[1]


def _up(numerator: int, denominator: int, step: int) -> int:
    """The first multiple of `step` that is not below the quotient."""
    return -(-numerator // (denominator * step)) * step
