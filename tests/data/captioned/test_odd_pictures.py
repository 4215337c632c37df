"""Pictures as cameras, scanners and web pages leave them, in one folder: each has the right pixels, or its fault."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from glm_training.data import DataError
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from tests.data.captioned.building import opened

SIDE = 96
Make = Callable[[], bytes]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)  # type: ignore[arg-type]


def grey_16(value: int) -> bytes:
    """A PNG of one grey in 16 bits."""
    rows = (b"\0" + struct.pack(">H", value) * SIDE) * SIDE
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def turned() -> bytes:
    """Red above and blue below, stored with the red at the left and an orientation that turns it upright."""
    image = Image.new("RGB", (SIDE, SIDE), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, SIDE // 2, SIDE))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "PNG", exif=exif)


def palette() -> bytes:
    image = flat("P", 1)
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    return saved(image, "PNG", transparency=1)


def animated() -> bytes:
    return saved(flat("RGB", (255, 0, 0)), "GIF", save_all=True, append_images=[flat("RGB", (0, 255, 0))])


READ: dict[str, tuple[Make, tuple[int, int, int], int]] = {
    "a PNG that is called .jpg": (lambda: saved(flat("RGB", (10, 200, 30)), "PNG"), (10, 200, 30), 0),
    "CMYK": (lambda: saved(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), 0),
    "grey of 16 bits": (lambda: grey_16(0x8080), (128, 128, 128), 0),
    "a palette with a transparent colour": (palette, (255, 255, 255), 0),
    "turned by its EXIF": (turned, (255, 0, 0), 0),
    "grey with alpha": (lambda: saved(flat("LA", (0, 127)), "PNG"), (128, 128, 128), 0),
    "alpha": (lambda: saved(flat("RGBA", (255, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
    "one bit": (lambda: saved(flat("1", 1), "PNG"), (255, 255, 255), 0),
    "grey": (lambda: saved(flat("L", 77), "BMP"), (77, 77, 77), 0),
    "progressive": (
        lambda: saved(flat("RGB", (128, 128, 128)), "JPEG", progressive=True, quality=95), (128, 128, 128), 1,
    ),
    "animated": (animated, (255, 0, 0), 0),
    "with a colour profile, which is not applied": (
        lambda: saved(flat("RGB", (200, 40, 90)), "PNG", icc_profile=b"\0" * 128), (200, 40, 90), 0,
    ),
}  # fmt: skip
"""Name -> what makes it, the colour in the middle of the upper half, and by how much a codec may miss it."""

REFUSED: dict[str, tuple[Make, str]] = {
    "truncated": (lambda: saved(flat("RGB", (1, 2, 3)), "PNG")[:-30], "cannot be decoded (truncated or damaged)"),
    "no picture": (
        lambda: b"<html>not found</html>",
        "is not an image (PNG, JPEG, WEBP, GIF, BMP, TIFF) but a web page",
    ),
    "a pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        "TIFF) but a pointer of Git LFS",
    ),
    "a bomb": (lambda: saved(Image.new("1", (20_000, 20_000)), "PNG"), "is taken for a decompression bomb"),
    "HEIC": (
        lambda: b"\0\0\0\x18ftypheic" + bytes(100),
        "is of a kind that is not read (HEIC, AVIF or JPEG XL)",
    ),
    "numbers without a white": (lambda: saved(Image.new("F", (SIDE, SIDE)), "TIFF"), "without a defined white"),
}


def test_odd_pictures_have_the_right_pixels(tmp_path: Path) -> None:
    for place, (make, *_) in enumerate(READ.values()):
        (tmp_path / f"{place:02d}.jpg").write_bytes(make())
        (tmp_path / f"{place:02d}.txt").write_text("a picture")
    data = CaptionedImages([opened(tmp_path)], Shaping(32, 32))
    batch = data.batch(range(len(READ)))
    assert batch.targets is not None and len(data) == len(READ) == 12
    for name, pixels, (_, colour, slack) in zip(READ, batch.targets, READ.values(), strict=True):
        found = pixels[:, 8, 16].mul(255).round().int().tolist()
        assert all(abs(a - b) <= slack for a, b in zip(found, colour, strict=True)), (name, found)


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_are_refused(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(saved(flat("RGB", (number, 0, 0)), "PNG") if number else make())
        (tmp_path / f"{number}.txt").write_text("a picture")
    with pytest.raises(DataError) as caught:
        CaptionedImages([opened(tmp_path)], Shaping(32, 32))
    (problem,) = caught.value.problems
    assert problem.path == tmp_path / "0.png" and reason in problem.reason
    kept = CaptionedImages([opened(tmp_path)], Shaping(32, 32), max_bad_fraction=0.5)
    assert [row.sum() for row in kept.batch([0]).targets[0].mul(255).round()[:, 0, :1]] == [1, 0, 0]  # type: ignore[index]


def test_a_picture_that_is_too_small_is_left_out_and_no_fault(tmp_path: Path) -> None:
    for number, side in enumerate((SIDE, 8)):
        (tmp_path / f"{number}.png").write_bytes(saved(Image.new("RGB", (side, side)), "PNG"))
        (tmp_path / f"{number}.txt").write_text("a picture")
    data = CaptionedImages([opened(tmp_path)], Shaping(32, 32))
    assert data.skipped.counts() == (0, 1) and len(data.remarks) == 1
