"""How large a picture is, from the beginning of its file: no pixel is decoded where the header alone tells.

What is said here is what :func:`glm_training.data.pictures.images.decode_image` makes of the file, upright. So what
may turn a picture has to be read as it is read there: where that cannot be told from the header (TIFF, a PNG whose
metadata follow its pixels, a file whose header Pillow stops at), the picture is decoded after all.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from glm_training.data.pictures.images import DECODE_ERRORS, FORMATS, MAX_PIXELS, decode_image, upright

Part = Callable[[int, int], bytes]
"""Up to so many bytes of a file from an offset; none at its end. `(offset, size)`."""

BUFFER = 16384
"""Bytes that are read at once: most headers are shorter, with the preview that cameras put into them."""

_PNG = b"\x89PNG\r\n\x1a\n"
_HOPS = 16
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
"""Chunks of a PNG that may say how it is turned."""

_EXIF_OR_XMP = 0x08 | 0x04
"""Flags of a WebP."""


def upright_size(path: Path, part: Part, whole: Callable[[], bytes]) -> tuple[int, int]:
    """(height, width) of the upright picture.

    Args:
        path: names the file in errors.
        part: reads some of it. whole: reads all of it, where the beginning does not tell.

    Raises ``DataError`` as :func:`decode_image` does, for what can be known without decoding.
    """
    try:
        size = None if _png_tells_later(part, whole) else _told_by_header(_File(part))
    except (UnidentifiedImageError, Image.DecompressionBombWarning, *DECODE_ERRORS):
        size = None
    if size is not None and size[0] * size[1] <= MAX_PIXELS:
        return size
    image = decode_image(path, whole())  # says what is wrong, too
    return image.height, image.width


class _File(io.RawIOBase):
    """A file that is read where it is asked for."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._part(self._place, len(view))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    def tell(self) -> int:
        return self._place


def _told_by_header(raw: _File) -> tuple[int, int] | None:
    file = io.BufferedReader(raw, BUFFER)
    head = file.read(30)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp_size(head)
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        if image.format == "TIFF":  # keeps its orientation elsewhere than the others
            return None
        probe = Image.new("L", (2, 1))
        probe.info = dict(image.info)  # Pillow reads metadata from there, of these formats
        turned = upright(probe).size == (1, 2)
        return (image.width, image.height) if turned else (image.height, image.width)


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Of the canvas, from the 30 bytes that a WebP begins with; None where metadata may turn it."""
    kind = head[12:16]
    if kind == b"VP8X" and not head[20] & _EXIF_OR_XMP:
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
    else:
        return None
    return height, width


def _png_tells_later(part: Part, whole: Callable[[], bytes]) -> bool:
    """Whether a file is a PNG in which chunks that may say how it is turned follow the pixels."""
    place, pixels, read = 8, 0, part
    if part(0, 8) != _PNG:
        return False
    while len(header := read(place, 8)) == 8 and header[4:] != b"IEND":
        pixels += header[4:] == b"IDAT"
        if pixels and header[4:] in _TEXTS:
            return True
        if pixels == _HOPS:  # pixels in so small pieces are sooner read than jumped over
            read = in_memory(whole())
        place += 12 + int.from_bytes(header[:4], "big")
    return False


def in_memory(data: bytes) -> Part:
    """Reads some of a file that is read already."""
    return lambda offset, size: data[offset : offset + size]
