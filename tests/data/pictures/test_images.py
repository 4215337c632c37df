"""Every encoding an image file may have comes out as the RGB that a viewer shows, or as an error naming the file."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from glm_training.data import DataError, load_image
from glm_training.data.pictures.images import decode_image, fitted, load_fitted

WHITE = [255, 255, 255]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, rows: list[bytes], width: int, colour_type: int, depth: int, key: bytes = b"") -> Path:
    """A PNG of raw rows, for what Pillow cannot write: 16-bit colour, 2-bit grey, their colour keys."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = _chunk(b"IHDR", header) + (_chunk(b"tRNS", key) if key else b"") + _chunk(b"IDAT", data)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + _chunk(b"IEND", b""))
    return path


def pixels(path: Path) -> list[list[int]]:
    """The decoded pixels, row by row."""
    return np.asarray(decode_image(path)).reshape(-1, 3).tolist()


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def grey16(values: list[int]) -> list[bytes]:
    return [struct.pack(f">{len(values)}H", *values)]


VALUES_16 = [0, 255, 257, 32896, 65535]
VALUES_8 = [0, 1, 1, 128, 255]


def test_load_image_is_float_rgb_in_unit_range(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 32), (255, 0, 51))
    tensor = load_image(save(image, tmp_path / "a.png"), 32, 48)
    assert tensor.shape == (3, 32, 48) and tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    tensor = load_fitted(save(Image.fromarray(array), tmp_path / "a.png"), 32, 64).pixels
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)


def test_grey_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", grey16(VALUES_16), 5, 0, 16)
    assert pixels(path) == [[value] * 3 for value in VALUES_8]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_grey_16_bit_tiff_of_either_byte_order(tmp_path: Path, mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (5, 1), np.array(VALUES_16, dtype=order).tobytes())
    assert pixels(save(image, tmp_path / "a.tiff")) == [[value] * 3 for value in VALUES_8]


def test_rgb_16_bit_is_scaled(tmp_path: Path) -> None:
    row = struct.pack(">6H", 0, 32896, 65535, 65535, 257, 255)
    found = np.array(pixels(write_png(tmp_path / "a.png", [row], 2, 2, 16)))
    assert np.abs(found - np.array([[0, 128, 255], [255, 1, 1]])).max() <= 1


@pytest.mark.parametrize("colour_type", [4, 6])
def test_16_bit_alpha_is_composited(tmp_path: Path, colour_type: int) -> None:
    channels = 1 if colour_type == 4 else 3
    row = struct.pack(f">{2 * (channels + 1)}H", *[0] * channels, 0, *[0] * channels, 65535)
    assert pixels(write_png(tmp_path / "a.png", [row], 2, colour_type, 16)) == [WHITE, [0, 0, 0]]


@pytest.mark.parametrize(
    ("colour_type", "depth", "row", "key"),
    [
        (0, 16, struct.pack(">2H", 258, 0), struct.pack(">H", 258)),
        (2, 16, struct.pack(">6H", 258, 258, 258, 0, 0, 0), struct.pack(">3H", 258, 258, 258)),
        (0, 2, bytes([0b01_00_0000]), struct.pack(">H", 1)),
        (0, 4, bytes([0x10]), struct.pack(">H", 1)),
        (0, 1, bytes([0b10_000000]), struct.pack(">H", 1)),
        (0, 8, bytes([7, 0]), struct.pack(">H", 7)),
        (2, 8, bytes([7, 7, 7, 0, 0, 0]), struct.pack(">3H", 7, 7, 7)),
    ],
)
def test_a_colour_key_becomes_white_at_any_depth(
    tmp_path: Path, colour_type: int, depth: int, row: bytes, key: bytes
) -> None:
    path = write_png(tmp_path / "a.png", [row], 2, colour_type, depth, key)
    assert pixels(path) == [WHITE, [0, 0, 0]]


def test_rgba_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels(save(image, tmp_path / "a.png")) == [[255, 127, 127], WHITE]


def test_grey_with_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (10, 255))
    assert pixels(save(image, tmp_path / "a.png")) == [WHITE, [10, 10, 10]]


def test_palette_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(save(image, tmp_path / "a.png")) == [[1, 2, 3], [200, 100, 50]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(save(image, tmp_path / "a.png", transparency=transparency)) == [WHITE, [200, 100, 50]]


def test_one_bit(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    assert pixels(save(image, tmp_path / "a.png")) == [[0, 0, 0], WHITE]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.array(pixels(save(image, tmp_path / "a.jpg"))) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_defined_white_are_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(DataError, match="without a defined white.*8 or 16 bits"):
        decode_image(save(Image.new(mode, (4, 4)), tmp_path / "a.tiff"))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    stored = Image.new("RGB", (4, 2), (0, 0, 255))
    stored.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by 90 degrees clockwise
    image = decode_image(save(stored, tmp_path / "a.png", exif=exif))
    assert image.size == (2, 4)
    assert image.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert pixels(path)[0] == [255, 0, 0]


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (2, 2), (9, 8, 7)).save(path, format="PNG")
    assert pixels(path)[0] == [9, 8, 7]


@pytest.mark.parametrize(("size", "kept"), [((96, 32), (32, 64)), ((32, 96), (32, 64))])
def test_resize_covers_then_crops_the_centre(tmp_path: Path, size: tuple[int, int], kept: tuple[int, int]) -> None:
    ramp = np.arange(96, dtype=np.uint8)
    grid = np.broadcast_to(ramp[None, :] if size[0] == 96 else ramp[:, None], (size[1], size[0]))
    tensor = load_fitted(save(Image.fromarray(np.ascontiguousarray(grid)), tmp_path / "a.png"), 32, 32).pixels
    line = tensor[0, 0] if size[0] == 96 else tensor[0, :, 0]
    assert line.tolist() == list(range(*kept))


def test_the_filter_is_lanczos(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    found = load_fitted(save(image, tmp_path / "a.png"), 32, 32).pixels.permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)))
    assert not np.array_equal(found, np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC)))


def test_extreme_shapes_are_resized(tmp_path: Path) -> None:
    assert load_image(save(Image.new("RGB", (1, 500), "red"), tmp_path / "a.png"), 32, 64).shape == (3, 32, 64)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_an_error(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.img"
    array = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(path, format=format)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="a.img: "):
        decode_image(path)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"P6 1 1 255 abc", b"GIF89a"])
def test_what_is_no_image_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.png: "):
        decode_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    path = write_png(tmp_path / "a.png", [b""], side, 0, 8)
    data = path.read_bytes()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(data[:8] + _chunk(b"IHDR", header) + data[33:])
    with pytest.raises(DataError, match="decompression bomb"):
        decode_image(path)


def test_folders_pipes_and_nothing_are_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", tmp_path / "none.png"):
        with pytest.raises(DataError, match=path.name):
            decode_image(path)


def test_a_size_below_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="height 0"):
        load_image(tmp_path / "a.png", 0, 32)


def test_where_an_image_was_cut(tmp_path: Path) -> None:
    """200 x 100 covers 50 x 50 as 100 x 50: 50 columns too many. A ramp from 0 to 199 shows which were cut off."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
    centre = load_fitted(save(ramp, tmp_path / "a.png"), 50, 50)
    assert centre.original_size == (100, 200) and centre.crop == (0, 25)
    for place, mirrored, left, first in (
        ((0.0, 0.0), False, 0, 0.5),
        ((0.9, 0.2), False, 10, 20.5),  # column 10 of the resized image has columns 20 and 21 of the file
        ((0.9, 0.2), True, 40, 118.5),  # what was cut off on the right: 100 - 10 - 50
    ):
        cut = fitted(ramp, 50, 50, place, mirrored=mirrored)
        assert cut.crop == (0, left) and cut.pixels.shape == (3, 50, 50)
        assert abs(cut.pixels[0, 20, 0].item() - first) <= 1  # rounding, and the filter at the edge
    assert fitted(ramp.rotate(90, expand=True), 25, 50, (0.5, 0.5)).crop == (38, 0)  # half of 100 - 25, rounded
    assert fitted(ramp, 100, 200, (1.0, 1.0)).crop == (0, 0)
