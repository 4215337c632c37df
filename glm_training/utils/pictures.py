"""Picture files: one image, or a labelled grid of images."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_CELL, MAX_CELL = 160, 384
MARGIN = 8
LABEL_WIDTH = 220
FONT_SIZE = 15
SHEET_CELL, SHEET_LINES = 192, 3
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial.ttf",
    "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc",
)  # fmt: skip
"""Of Linux, Windows and macOS, for letters that Pillow's own font lacks: it has little beyond ASCII."""
NO_LETTER = "\uffff"
INK, QUIET, PAPER, GREEN = (20, 20, 20), (110, 110, 110), (255, 255, 255), (0, 110, 40)
FRAME = 3


Pictures = Tensor | list[Tensor]
"""Images [n, 3, H, W] in [0, 1]; a list of [3, H, W] where their sizes differ."""


class Caption(NamedTuple):
    """What stands under a picture; `good`: in green, with a frame around the picture."""

    text: str
    good: bool = False


NO_CAPTION = Caption("")
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_pil(image: Tensor | Image.Image) -> Image.Image:
    """An 8-bit RGB picture of a float tensor ``[3, H, W]`` in [0, 1] (clamped, NaN as 0) on any device."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image is [3, H, W], not {list(image.shape)}")
    levels = image.detach().to("cpu", torch.float32).nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def as_saved(images: Tensor) -> Tensor:
    """Images [..., H, W] as a file of 8 bits gives them back: fp32 in [0, 1], NaN as 0."""
    return images.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round() / 255


def each(images: Pictures, change: Callable[[Tensor], Tensor]) -> Pictures:
    """`images`, all of them changed: together, or one by one where their sizes differ."""
    return [change(image) for image in images] if isinstance(images, list) else change(images)


def save_image(path: Path, image: Tensor | Image.Image) -> None:
    """Write one image, in the format of the path's suffix; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path)


def save_grid(
    path: Path,
    rows: Sequence[Sequence[Tensor | Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    corner: str = "",
    captions: Sequence[Sequence[Caption]] = (),
    abreast: int = 1,
) -> None:
    """Write a grid of pictures, with a label beside each row (a prompt, wrapped) and one above each column; `corner`
    says above the rows' labels what they are.

    Args:
        path: the picture to write; folders are made.
        rows: R rows of C images each, ``[3, H, W]`` in [0, 1] or PIL; small ones are enlarged to be seen.
        row_labels: R texts. column_labels: C texts.
        captions: R rows of C captions, or none at all.
        abreast: into how many parts the rows are divided that stand side by side; large pictures shrink with it.

    Raises:
        ValueError: when the counts do not agree.
    """
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in (*rows, *captions)):
        shape = [len(row) for row in (*rows, *captions)]
        raise ValueError(f"{len(row_labels)} row and {len(column_labels)} column labels for rows of {shape} images")
    largest = max(MIN_CELL, MAX_CELL // abreast)
    cells = [[_fit(to_pil(image), largest) for image in row] for row in rows]
    width = max((cell.width for row in cells for cell in row), default=MIN_CELL)
    font = font_for([*row_labels, *column_labels, corner])
    corner = _wrap(corner, font, LABEL_WIDTH)
    heads = [_wrap(label, font, width) for label in column_labels]
    beside = LABEL_WIDTH if any(row_labels) else max(round(font.getlength(line)) for line in corner.split("\n"))
    size = -(-len(rows) // abreast)
    parts: list[Image.Image] = []
    for start in range(0, max(len(rows), 1), max(size, 1)):
        own = slice(start, start + size)
        labels = [_wrap(label, font, LABEL_WIDTH) for label in row_labels[own]]
        parts.append(_grid(cells[own], labels, heads, corner, captions[own], font, (beside, width)))
    canvas = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), PAPER)
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width
    save_image(path, canvas)


def _grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    heads: Sequence[str],
    corner: str,
    captions: Sequence[Sequence[Caption]],
    font: Font,
    widths: tuple[int, int],
) -> Image.Image:
    """The grid of some rows, all texts wrapped; `widths` of the labels and of a column."""
    beside, width = widths
    below = _text_height("") if captions else 0
    heights = [
        max([_text_height(label), *(cell.height + below for cell in row)])
        for row, label in zip(rows, labels, strict=True)
    ]
    left = beside + 2 * MARGIN
    top = max(map(_text_height, (corner, *heads))) + 2 * MARGIN
    size = (left + len(heads) * (width + MARGIN), top + sum(height + MARGIN for height in heights))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((MARGIN, MARGIN), corner, QUIET, font)
    for column, head in enumerate(heads):
        draw.multiline_text((left + column * (width + MARGIN), MARGIN), head, INK, font)
    for place, (row, label, height) in enumerate(zip(rows, labels, heights, strict=True)):
        draw.multiline_text((MARGIN, top), label, INK, font)
        for column, cell in enumerate(row):
            corner_of_cell = (left + column * (width + MARGIN), top)
            canvas.paste(cell, corner_of_cell)
            if captions:
                _write_caption(draw, captions[place][column], cell, corner_of_cell, font)
        top += height + MARGIN
    return canvas


def _write_caption(
    draw: ImageDraw.ImageDraw, caption: Caption, cell: Image.Image, corner: tuple[int, int], font: Font
) -> None:
    left, top = corner
    draw.text((left, top + cell.height), caption.text, GREEN if caption.good else QUIET, font)
    if caption.good:
        right, bottom = left + cell.width - 1, top + cell.height - 1
        draw.rectangle((left, top, right, bottom), outline=GREEN, width=FRAME)


def save_sheet(path: Path, images: Sequence[Tensor | Image.Image], labels: Sequence[str], columns: int = 6) -> None:
    """Write a contact sheet: pictures of any sizes in rows of `columns`, each with up to `SHEET_LINES` lines of its
    label below it; folders are made. Raises ValueError when the counts do not agree."""
    if len(images) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    font = font_for(labels)
    cell, below = SHEET_CELL, _text_height("\n" * (SHEET_LINES - 1))
    step = (cell + MARGIN, cell + below + MARGIN)
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (min(columns, len(images)) * step[0] + MARGIN, rows * step[1] + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = to_pil(image)
        picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        left, top = place % columns * step[0] + MARGIN, place // columns * step[1] + MARGIN
        canvas.paste(picture, (left, top + cell - picture.height))
        lines = _wrap(label, font, cell).split("\n")
        text = "\n".join(lines[:SHEET_LINES]) + ("..." if len(lines) > SHEET_LINES else "")
        draw.multiline_text((left, top + cell), text, INK, font)
    save_image(path, canvas)


def font_for(texts: Sequence[str]) -> Font:
    """Pillow's own font; where it lacks letters of the texts, that of this machine's `FONTS` that lacks the fewest."""
    own = ImageFont.load_default(size=FONT_SIZE)
    letters = {letter for text in texts for letter in text if letter.isprintable() and not letter.isspace()}
    if not _lacking(own, letters):
        return own
    found: list[Font] = [own]
    for name in FONTS:
        with suppress(OSError):  # not on this machine
            found.append(ImageFont.truetype(name, FONT_SIZE))
    return min(found, key=lambda font: _lacking(font, letters))


def _lacking(font: Font, letters: Iterable[str]) -> int:
    """How many of some letters a font draws as it draws what is no letter in any."""
    none = bytes(font.getmask(NO_LETTER))
    return sum(bytes(font.getmask(letter)) == none for letter in letters)


def _fit(image: Image.Image, largest: int = MAX_CELL) -> Image.Image:
    """Small pictures by a whole factor, so that pixels stay square; large ones down to `largest` pixels."""
    longest = max(image.size)
    if longest > largest:
        scale = largest / longest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, min(-(-MIN_CELL // longest), largest // longest))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _text_height(text: str) -> int:
    return (text.count("\n") + 1) * (FONT_SIZE + 4)


def _wrap(text: str, font: Font, width: int) -> str:
    """Break a text into lines of at most ``width`` pixels, between words where there are any."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            *full, line = _pieces(word, font, width)
            lines += full
        lines.append(line)
    return "\n".join(lines)


def _pieces(word: str, font: Font, width: int) -> list[str]:
    """A word too long for a line (or a script without spaces) cut where it overflows."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
