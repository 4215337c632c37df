"""The size that a header tells is that of the decoded picture, and no more of the file is read than it takes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glm_training.data.pictures import picture_size
from glm_training.data.pictures.images import decode_image
from glm_training.data.pictures.picture_size import BUFFER, upright_size
from glm_training.data.problems import DataError

NAME = Path("a picture")
NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def saved(kind: str, orientation: int = 1, **options: object) -> bytes:
    """400 x 300 pixels of noise, hundreds of kB in most formats."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation > 1:
        options["exif"] = exif.tobytes()
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, format=kind, **options)
    return file.getvalue()


class Read:
    """A file in memory that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.bytes, self.wholes = data, 0, 0

    def part(self, offset: int, size: int) -> bytes:
        found = self.data[offset : offset + size]
        self.bytes += len(found)
        return found

    def whole(self) -> bytes:
        self.wholes += 1
        return self.data

    def size(self) -> tuple[int, int]:
        return upright_size(NAME, self.part, self.whole)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'

TOLD_EARLY = {
    "PNG": saved("PNG"),
    "PNG, turned": saved("PNG", 6),
    "JPEG": saved("JPEG", quality=95),
    "JPEG, turned": saved("JPEG", 8, quality=95),
    "JPEG, upside down": saved("JPEG", 3, quality=95),
    "JPEG, turned by XMP": saved("JPEG", quality=95, xmp=XMP),
    "progressive JPEG": saved("JPEG", 5, progressive=True, quality=95),
    "WebP": saved("WEBP", quality=95),
    "lossless WebP": saved("WEBP", lossless=True),
    "WebP with a profile": saved("WEBP", quality=95, icc_profile=b"x" * 100),
    "GIF": saved("GIF"),
    "BMP": saved("BMP"),
}
WHOLE_OR_DECODED = {
    "WebP, turned": saved("WEBP", 6, quality=95),  # its metadata stand at the end
    "TIFF": saved("TIFF"),
    "TIFF, turned": saved("TIFF", 7),
}


@pytest.mark.parametrize("name", TOLD_EARLY)
def test_the_header_tells(name: str, monkeypatch) -> None:
    file = Read(TOLD_EARLY[name])
    decoded = decode_image(NAME, file.data)
    monkeypatch.setattr(picture_size, "decode_image", lambda *_: pytest.fail("was decoded"))
    assert file.size() == (decoded.height, decoded.width)
    assert file.size()[0] == (400 if "turned" in name or "progressive" in name else 300)
    assert file.wholes == 0 and file.bytes <= 2 * (BUFFER + 500)  # of two times


@pytest.mark.parametrize("name", WHOLE_OR_DECODED)
def test_where_it_does_not_the_rest_is_read(name: str) -> None:
    file = Read(WHOLE_OR_DECODED[name])
    decoded = decode_image(NAME, file.data)
    assert file.size() == (decoded.height, decoded.width) == ((400, 300) if "turned" in name else (300, 400))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int) -> None:
    data = saved("JPEG", orientation)
    decoded = decode_image(NAME, data)
    assert Read(data).size() == (decoded.height, decoded.width) == ((400, 300) if orientation > 4 else (300, 400))


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    data = saved("PNG")
    end = data.index(b"IEND") - 4
    late = Read(data[:end] + chunk + data[end:])
    assert decode_image(NAME, late.data).size == (300, 400)
    assert late.size() == (400, 300)


def test_pixels_in_small_pieces_are_read_once_and_not_decoded(monkeypatch) -> None:
    """A PNG as libpng writes it, with 8 kB in a chunk."""
    data = TOLD_EARLY["PNG, turned"]
    start = data.index(b"IDAT") - 4
    pixels, place = b"", start
    while data[place + 4 : place + 8] == b"IDAT":
        length = int.from_bytes(data[place : place + 4], "big")
        pixels += data[place + 8 : place + 8 + length]
        place += 12 + length
    pieces = b"".join(png_chunk(b"IDAT", pixels[at : at + 8192]) for at in range(0, len(pixels), 8192))
    file = Read(data[:start] + pieces + data[place:])
    assert decode_image(NAME, file.data).size == (300, 400)
    monkeypatch.setattr(picture_size, "decode_image", lambda *_: pytest.fail("was decoded"))
    assert file.size() == (400, 300) and file.wholes == 1


def test_a_header_that_pillow_stops_at_is_read_as_the_picture_is() -> None:
    """A profile that does not inflate: the picture is read without it."""
    data = saved("PNG")
    broken = data[:33] + png_chunk(b"iCCP", b"name\0\0" + b"no zlib") + data[33:]
    assert Read(broken).size() == (300, 400)


@pytest.mark.parametrize("data", [b"", b"no picture at all, but a text of some length", TOLD_EARLY["PNG"][:20]])
def test_what_is_no_picture_is_named(data: bytes) -> None:
    with pytest.raises(DataError, match="a picture"):
        Read(data).size()


def test_a_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match="decompression bomb"):
        Read(bomb).size()
