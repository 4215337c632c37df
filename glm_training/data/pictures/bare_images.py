"""PNG and JPEG files without what is not the picture, for files whose metadata no reader gets past.

Photo tools, phones and image generators leave broken profiles, texts of megabytes and half segments behind. None of it
is a pixel: these functions copy a file without it, and leave the bytes of the picture themselves as they are.
"""

import struct
import zlib
from io import BytesIO

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3
_TRANSPARENT_BYTES = {0: 2, 2: 6}
"""Colour type of a PNG without alpha channel -> length of its colour key."""

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_EXIF, _JFIF, _ADOBE = b"Exif\0\0", b"JFIF\0", b"Adobe"
_SEQUENTIAL = (0xC0, 0xC1)
_OTHER_BITS = (b"\xaa", b"\x55", b"\x7f", b"\xff\0", b"\x33")


def bare(data: bytes) -> bytes | None:
    """The file ``data`` with its picture and orientation alone; None unless it is a PNG or JPEG with something to leave
    out."""
    stripped = _bare_png(data) if data.startswith(_PNG) else _bare_jpeg(data) if data.startswith(_SOI) else data
    return None if stripped == data else stripped


def _bare_png(data: bytes) -> bytes:
    """Of the chunks IHDR, PLTE, IDAT, IEND, a tRNS of the right length and eXIf; of an animation the first frame."""
    kept, place, colour_type = [_PNG], len(_PNG), -1
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        chunk = data[place : place + 12 + length]
        if name == b"IHDR" and length == 13:
            colour_type = body[9]
        wanted = name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (name == b"tRNS" and _fits(body, colour_type))
        if name == b"eXIf" and chunk[-4:] == struct.pack(">I", zlib.crc32(name + body)):
            wanted = True
        if wanted:
            kept.append(chunk)
        place += 12 + length
        if name == b"IEND":
            return b"".join(kept)
    return b"".join([*kept, data[place:]])


def _fits(transparency: bytes, colour_type: int) -> bool:
    if colour_type == _PALETTE:
        return 1 <= len(transparency) <= 256
    return len(transparency) == _TRANSPARENT_BYTES.get(colour_type)


def _bare_jpeg(data: bytes) -> bytes:
    """Without segments of applications and comments, but for whole ones that say how the picture is coded or turned."""
    kept, place = [_SOI], len(_SOI)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker == 0xDA or 0xD0 <= marker <= 0xD9:  # the picture begins; or nothing that has a length
            break
        (length,) = struct.unpack_from(">H", data, place + 2)
        body = data[place + 4 : place + 2 + length]
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or _is_whole(marker, body):
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return b"".join([*kept, data[place:]])


def _is_whole(marker: int, body: bytes) -> bool:
    """Whether a segment is one of the three that matter, at its full length."""
    if marker == 0xE0:
        return body.startswith(_JFIF) and len(body) >= 14
    if marker == 0xEE:  # says whether colours are stored as YCbCr, and CMYK inverted
        return body.startswith(_ADOBE) and len(body) >= 12
    return marker == 0xE1 and body.startswith(_EXIF) and len(body) > len(_EXIF)


def ended_jpeg(data: bytes) -> bytes | None:
    """A JPEG whose end mark alone is missing, with it; None for another file, and where picture is missing too.

    A decoder goes on with zero bits when its data end. So the file is also ended with other bits before the mark,
    several kinds of them since some happen to say the same: a whole picture takes no notice of any.
    """
    if not data.startswith(_SOI) or data.rstrip(b"\0").endswith(_EOI) or not _is_sequential(data):
        return None
    data = data.removesuffix(b"\xff")  # half of the mark
    try:
        pictures = [_pixels(data + bits * 64 + _EOI) for bits in (b"", *_OTHER_BITS)]
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
    return data + _EOI if all(picture == pictures[0] for picture in pictures) else None


def _pixels(data: bytes) -> bytes:
    with Image.open(BytesIO(data), formats=("JPEG",)) as image:
        return image.tobytes()


def _is_sequential(data: bytes) -> bool:
    """Whether it is coded in one pass: of several, whole ones may be missing without a trace."""
    place = len(_SOI)
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        if data[place + 1] in _SEQUENTIAL:
            return True
        place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    return False
