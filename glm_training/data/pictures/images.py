"""Image files to RGB tensors: what a file says in any of its many encodings, or an error that names the file.

The rules, the same for scanning and for training:

* the content decides the format, not the suffix: PNG, JPEG, WebP, GIF, BMP or TIFF; of an animation the first frame;
* EXIF orientation is applied, where it can be read; ICC profiles are not, values are taken as sRGB;
* damaged metadata are passed over, damaged pixels are refused;
* transparency (alpha channel, palette or colour key) is composited on white;
* 16-bit values are scaled to 8 bits, never clipped; 32-bit integer and float images have no defined white: refused;
* the image is resized to *cover* height x width with a Lanczos filter, then the centre is cropped.
"""

import hashlib
import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from glm_training.data.pictures.bare_images import bare, ended_jpeg
from glm_training.data.problems import DataError, Problem
from glm_training.data.text_lines import UNREAD_IMAGE, is_unread_image, other_kind

# What Pillow has to say of metadata names no file, and is of no consequence here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 89_478_485
"""Width times height above which a file is taken for a decompression bomb: Pillow's own warning level."""

MAX_REREAD_BYTES = 2**28
"""A file above this is not read a second time, without its metadata."""

DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow's readers raise on damaged files; anything else is a fault of ours and is let through."""


@dataclass(frozen=True)
class CroppedImage:
    """uint8 ``pixels [3, H, W]``, the upright file's (height, width), and the (top, left) of the crop in the resized
    image, in pixels of that."""

    pixels: Tensor
    original_size: tuple[int, int]
    crop: tuple[int, int]


def load_image(path: Path, height: int, width: int) -> Tensor:
    """The image at ``path`` as float32 ``[3, height, width]`` in [0, 1]; raises ``DataError`` when it has none."""
    return to_unit_range(load_fitted(path, height, width).pixels)


def load_fitted(
    path: Path, height: int, width: int, *, digest: str | None = None, mirrored: bool = False
) -> CroppedImage:
    """As :func:`load_image`, still uint8: a quarter of the memory, and no less precise; with where it was cut.

    Raises ``DataError`` also for a file whose SHA-256 is not ``digest``, where one is given.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image cannot be resized to height {height} x width {width}: both must be at least 1")
    image = decode_image(path) if digest is None else decode_image(path, read_unchanged(path, digest))
    return fitted(image, height, width, mirrored=mirrored)


def read_unchanged(path: Path, digest: str) -> bytes:
    """The bytes of an image file; raises ``DataError`` when they are gone or no longer those of the SHA-256."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise _refusal(path, reason, "Put the image there")
        data = path.read_bytes()
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}", "Correct the file's permissions") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise _refusal(
            path, "changed since the start of the run", "Put the old one back and resume, or start a new run"
        )
    return data


def fitted(
    image: Image.Image, height: int, width: int, place: tuple[float, float] = (0.5, 0.5), *, mirrored: bool = False
) -> CroppedImage:
    """``image`` resized to cover ``height`` x ``width`` and cut.

    ``place``: which part of the overhang is cut off at the top and at the left, each in [0, 1]. ``mirrored``: then its
    left edge is what was the right one, and the crop counts from there.
    """
    top, left = place
    cut = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS, centering=(left, top))
    pixels = torch.from_numpy(np.array(cut, dtype=np.uint8)).permute(2, 0, 1)
    if mirrored:
        pixels, left = pixels.flip(-1), 1 - left
    scale = max(height / image.height, width / image.width)
    crop = round((image.height * scale - height) * top), round((image.width * scale - width) * left)
    return CroppedImage(pixels.contiguous(), (image.height, image.width), crop)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 0..255 of any shape to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def decode_image(path: Path, data: bytes | None = None) -> Image.Image:
    """The upright RGB image at ``path``, in its own size; raises ``DataError`` when it cannot be decoded whole.

    With ``data`` these encoded bytes are decoded, and ``path`` only names them in errors. Metadata that cannot be read
    do not count: where Pillow stops at them, the file is read without them.
    """
    try:
        if data is None and not path.is_file():  # opening a pipe would wait for ever
            raise _refusal(path, "is not a regular file" if path.exists() else "does not exist", "Put the image there")
        return _decode(path, path if data is None else BytesIO(data))
    except UnidentifiedImageError as error:
        refusal = _refusal(path, *_no_format(path, data))
        cause: Exception = error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refusal(
            path, f"is taken for a decompression bomb: {str(error).rstrip('.')}", "Save it smaller"
        ) from error
    except DECODE_ERRORS as error:
        detail = str(error) or type(error).__name__
        refusal = _refusal(path, f"cannot be decoded (truncated or damaged): {detail}", "Save the image again")
        cause = error
    bare_image = _decode_bare(path, data)
    if bare_image is None:
        raise refusal from cause
    return bare_image


def _no_format(path: Path, data: bytes | None) -> tuple[str, str]:
    """What is wrong with a file of none of the formats, as far as its beginning tells, and the remedy."""
    if data is None:
        with path.open("rb") as file:
            data = file.read(64)
    if not data:
        return "is an empty file", "Put the picture there"
    if is_unread_image(data[:64]):
        return UNREAD_IMAGE
    kind = other_kind(data[:64])
    known = "" if kind in (None, "an image") else f" but {kind}"
    return f"is not an image ({', '.join(FORMATS)}){known}", "Convert or replace the file"


def _decode(path: Path, source: Path | BytesIO) -> Image.Image:
    with Image.open(source, formats=FORMATS) as image:
        _check_pixel_count(path, image)
        _scale_colour_key(image)
        image.load()
        return _to_rgb(path, upright(image))


def _decode_bare(path: Path, data: bytes | None) -> Image.Image | None:
    """The picture of a PNG or JPEG without its metadata, or with the end mark that it lacks; None where that does not
    help. Raises ``DataError`` for a picture that is refused."""
    try:
        if data is None:
            if path.stat().st_size > MAX_REREAD_BYTES:
                return None
            data = path.read_bytes()
        stripped = bare(data) or data
        whole = ended_jpeg(stripped) or stripped
        return None if whole == data else _decode(path, BytesIO(whole))
    except (*DECODE_ERRORS, UnidentifiedImageError):
        return None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is, where that says nothing that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def _refusal(path: Path, reason: str, remedy: str) -> DataError:
    return DataError([Problem(path, reason, remedy)])


def _check_pixel_count(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        reason = f"is taken for a decompression bomb: {image.width} x {image.height} is over {MAX_PIXELS} pixels"
        raise _refusal(path, reason, "Save it smaller")


def _scale_colour_key(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the 8-bit scale that the samples will have once loaded.

    Pillow expands 2- and 4-bit grey and shortens 16-bit RGB while loading, but leaves the colour key as it was written.
    """
    if not isinstance(image, PngImageFile) or not image.tile:
        return
    key = image.info.get("transparency")
    raw_mode = image.tile[0].args
    if raw_mode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _grey16_to_8(image)
    elif image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise _refusal(path, f"has {kind} samples without a defined white", "Save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layers)
    return image.convert("RGB")


def _grey16_to_8(image: Image.Image) -> Image.Image:
    """Grey 0..65535 to 0..255, rounded; Pillow's own conversion clips at 255. A colour key becomes an alpha channel."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return grey
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
