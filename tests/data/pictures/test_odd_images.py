"""Pictures with odd metadata are read to the last pixel; pictures with damaged pixels are refused."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glm_training.data import DataError
from glm_training.data.pictures.images import decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    picture.copy().save(buffer, kind, **options)  # a picture remembers settings of an earlier save
    return buffer.getvalue()


PNG, JPEG = encoded(PICTURE, "PNG"), encoded(PICTURE, "JPEG", quality=95)
AS_JPEG = np.asarray(Image.open(BytesIO(JPEG)))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(Path("odd"), data))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*chunks: bytes) -> bytes:
    """The picture with chunks after its IHDR."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def jpeg(marker: int, body: bytes) -> bytes:
    """The picture with a segment of its own before all others."""
    return JPEG[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


def exif(kind: int, count: int, value: bytes) -> bytes:
    """A TIFF block with the tag of the orientation alone."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI", 0x112, kind, count) + value + bytes(4)


BROKEN_EXIF = {
    "no tiff": b"garbage!!",
    "bad offset": b"MM\0*\xff\xff\xff\xff",
    "bad directory": b"MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40,
    "orientation is text": exif(2, 4, b"abc\0"),
    "orientation 99": exif(3, 1, b"\0\x63\0\0"),
    "orientation of 9999 values": exif(3, 9999, b"\0\0\0\x08"),
    "orientation of no type": exif(99, 1, b"\0\6\0\0"),
    "orientation elsewhere": exif(5, 1, b"\0\0\xff\xff"),
    "empty": b"",
}
MEGABYTES = b"a" * (2 << 20)
ODD_PNG = {
    "profile no zlib": png(chunk(b"iCCP", b"name\0\0notzlib")),
    "profile of another method": png(chunk(b"iCCP", b"name\0\x05" + zlib.compress(b"x"))),
    "profile without a name": png(chunk(b"iCCP", b"name")),
    "profile of 70 MB": png(chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(70 << 20)))),
    "text of 2 MB, compressed": png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(MEGABYTES))),
    "texts of 80 MB": png(*[chunk(b"tEXt", b"k\0" + MEGABYTES)] * 40),
    "text with a wrong sum": png(chunk(b"tEXt", b"k\0v")[:-4] + b"bad!"),
    "short gamma": png(chunk(b"gAMA", b"\0")),
    "short chromaticities": png(chunk(b"cHRM", b"\0")),
    "short density": png(chunk(b"pHYs", b"\0")),
    "no intent": png(chunk(b"sRGB", b"")),
    "short colour key": png(chunk(b"tRNS", b"\0")),
    "short animation": png(chunk(b"acTL", b"\0")),
    "stray frame": png(chunk(b"fcTL", bytes(26))),
    "unknown chunk": png(chunk(b"abCd", b"x" * 10)),
    "broken xmp": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<broken")),
    "more after the end": PNG + b"garbage" * 20,
    "no end": PNG[:-12],
    **{f"exif, {name}": png(chunk(b"eXIf", block)) for name, block in BROKEN_EXIF.items()},
}
ODD_JPEG = {
    "profile no profile": encoded(PICTURE, "JPEG", quality=95, icc_profile=b"not a profile" * 5),
    "profile in wrong parts": jpeg(0xE2, b"ICC_PROFILE\0\x02\x05abcd"),
    "short jfif": JPEG[:2] + b"\xff\xe0\0\x07JFIF\0" + JPEG[20:],
    "short adobe": jpeg(0xEE, b"Adobe"),
    "broken photoshop": jpeg(0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 12),
    "broken index of pictures": jpeg(0xE2, b"MPF\0" + b"\xff" * 20),
    "broken xmp": jpeg(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta broken"),
    "comment in no encoding": jpeg(0xFE, b"\xff\xfe\0a"),
    "more after the end": JPEG + bytes(100) + b"more",
    "no end": JPEG[:-2],
    "no end, and a comment": jpeg(0xEE, b"Adobe")[:-2],
    **{f"exif, {name}": jpeg(0xE1, b"Exif\0\0" + block) for name, block in BROKEN_EXIF.items()},
}


@pytest.mark.parametrize("name", ODD_PNG)
def test_a_png_is_its_pixels_whatever_is_written_beside_them(name):
    assert np.array_equal(decoded(ODD_PNG[name]), PIXELS)


@pytest.mark.parametrize("name", ODD_JPEG)
def test_a_jpeg_is_its_pixels_whatever_is_written_beside_them(name):
    assert np.array_equal(decoded(ODD_JPEG[name]), AS_JPEG)


@pytest.mark.parametrize(
    "block", [exif(3, 1, b"\0\6\0\0"), exif(4, 1, b"\0\0\0\6"), exif(3, 2, b"\0\6\0\6")], ids=["short", "long", "twice"]
)
def test_an_orientation_that_can_be_read_is_followed(block):
    turned = np.rot90(PIXELS, -1)
    assert np.array_equal(decoded(png(chunk(b"eXIf", block))), turned)
    assert np.array_equal(decoded(png(chunk(b"eXIf", block), chunk(b"gAMA", b""))), turned)  # though the rest is broken
    assert np.array_equal(decoded(jpeg(0xE1, b"Exif\0\0" + block)), np.rot90(AS_JPEG, -1))
    assert np.array_equal(decoded(encoded(PICTURE, "TIFF", tiffinfo={0x112: 6})), turned)


@pytest.mark.parametrize("block", list(BROKEN_EXIF.values())[:3], ids=list(BROKEN_EXIF)[:3])
def test_exif_of_a_webp(block):
    assert np.array_equal(decoded(encoded(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0" + block)), PIXELS)


def test_of_several_pictures_the_first_counts_though_the_others_be_broken():
    second = Image.fromarray(255 - PIXELS)
    palette, other = PICTURE.quantize(16), second.quantize(16)
    gif = encoded(palette, "GIF", save_all=True, append_images=[other])
    first = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decoded(gif), first) and np.array_equal(decoded(gif[:-40]), first)
    mpo = encoded(PICTURE, "MPO", quality=95, save_all=True, append_images=[second.copy()])
    assert np.array_equal(decoded(mpo), AS_JPEG) and np.array_equal(decoded(mpo[: len(JPEG) + 400]), AS_JPEG)
    assert np.array_equal(decoded(encoded(PICTURE, "PNG", save_all=True, append_images=[second.copy()])), PIXELS)
    assert np.array_equal(decoded(encoded(PICTURE, "TIFF", save_all=True, append_images=[second.copy()])), PIXELS)
    assert np.array_equal(
        decoded(encoded(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[second.copy()])), PIXELS
    )


def test_transparency_survives_where_metadata_do_not():
    palette = PICTURE.quantize(16)
    data = encoded(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    broken = data[:33] + chunk(b"gAMA", b"") + data[33:]
    assert np.array_equal(decoded(broken), decoded(data))
    assert not np.array_equal(decoded(data), np.asarray(palette.convert("RGB")))


def test_adobe_s_colours_survive_where_other_metadata_do_not():
    inks = encoded(PICTURE.convert("CMYK"), "JPEG", quality=95)
    broken = inks[:2] + b"\xff\xe0\0\x07JFIF\0" + inks[2:]
    assert np.array_equal(decoded(broken), decoded(inks))
    assert np.abs(decoded(inks).astype(int) - PIXELS).mean() < 40  # and not their negative


@pytest.mark.parametrize("flat", [False, True])
def test_a_jpeg_that_ends_early_is_refused_unless_no_pixel_is_missing(flat):
    picture = Image.new("RGB", (40, 48), (200, 30, 40)) if flat else PICTURE
    data = encoded(picture, "JPEG", quality=95)
    whole = np.asarray(Image.open(BytesIO(data)))
    refused = 0
    for cut in range(1, min(300, len(data) - 600)):
        try:
            assert np.array_equal(decoded(data[:-cut]), whole), cut
        except DataError:
            refused += 1
            assert cut > 2, "the end mark alone was missing"
    assert refused > (5 if flat else 250)


DAMAGED = {
    "half a png": PNG[: len(PNG) // 2],
    "a png without its last pixels": PNG[:-100],
    "pixels of a png with a wrong sum": PNG[:60] + b"\0\0" + PNG[62:],
    "a png with a wrong header": PNG[:29] + b"zzzz" + PNG[33:],
    "half a png behind a broken text": ODD_PNG["text with a wrong sum"][:-900],
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "half a jpeg behind a broken segment": ODD_JPEG["short adobe"][:-600],
    "half a progressive jpeg": encoded(PICTURE, "JPEG", progressive=True)[:-2],
    "half a gif": encoded(PICTURE.quantize(16), "GIF")[:400],
    "half a webp": encoded(PICTURE, "WEBP", lossless=True)[:900],
    "half a tiff": encoded(PICTURE, "TIFF")[:2000],
    "half a bmp": encoded(PICTURE, "BMP")[:2000],
    "a png's signature": PNG[:8],
    "a jpeg's signature": JPEG[:3],
    "nothing": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_picture_is_refused(name):
    with pytest.raises(DataError, match=r"cannot be decoded|is not an image|is an empty file"):
        decoded(DAMAGED[name])


def test_a_bomb_is_one_behind_broken_metadata_too(monkeypatch):
    monkeypatch.setattr("glm_training.data.pictures.images.MAX_PIXELS", 40 * 48 - 1)
    with pytest.raises(DataError, match="decompression bomb"):
        decoded(ODD_PNG["text with a wrong sum"])


def test_pillow_s_remarks_on_metadata_are_not_shown():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # as importing the module sets it
        for data in ODD_JPEG.values():
            decoded(data)
    assert told == []


def test_a_file_is_read_like_its_bytes(tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(ODD_PNG["text of 2 MB, compressed"])
    assert np.array_equal(np.asarray(decode_image(path)), PIXELS)
