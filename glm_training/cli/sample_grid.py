"""Overviews of drawn pictures: a few prompts or hundreds, on as many sheets as can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from glm_training.utils.pictures import MAX_CELL, save_grid, save_sheet

SHEET_COLUMNS, SHEET_PICTURES = 6, 60
GRID_COLUMNS, GRID_ROWS = 8, 20
"""A sheet is at most 8 pictures wide and 20 high: 3,400 x 7,900 pixels."""

LABEL = 240
"""Characters of a prompt that stand beside its pictures."""


@dataclass(frozen=True)
class Row:
    """The pictures of a prompt, with the name of each, plan by plan with its `renders`. number: of its files."""

    number: int
    prompt: str
    seed: int
    renders: int
    pictures: list[tuple[str, Path]]


def write_grids(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes `grid-<first>-<last>.png` of so many numbers of prompts each, with the prompt and the seed beside or below
    the pictures; none for a single picture. Raises OSError."""
    if sum(len(row.pictures) for row in rows) < 2:
        return []
    written = []
    if all(len(row.pictures) == 1 for row in rows):
        for start in range(0, len(rows), SHEET_PICTURES):
            page = rows[start : start + SHEET_PICTURES]
            images = [_small(row.pictures[0][1]) for row in page]
            labels = [f"{row.number}, seed {row.seed}: {row.prompt}" for row in page]
            written.append(_path(folder, page))
            save_sheet(written[-1], images, labels, SHEET_COLUMNS)
        return written
    width = _width(rows[0])
    page_of: list[list[Row]] = [[]]
    for row in rows:
        if page_of[-1] and sum(_height(each, width) for each in [*page_of[-1], row]) > GRID_ROWS:
            page_of.append([])
        page_of[-1].append(row)
    for page in page_of:
        written.append(_path(folder, page))
        _save(written[-1], page, width)
    return written


def _width(row: Row) -> int:
    """Pictures side by side: all of a prompt, or the renders of a plan, or as many as there is room for."""
    if len(row.pictures) <= GRID_COLUMNS:
        return len(row.pictures)
    return row.renders if 1 < row.renders <= GRID_COLUMNS else GRID_COLUMNS


def _height(row: Row, width: int) -> int:
    return -(-len(row.pictures) // width)


def _save(path: Path, rows: Sequence[Row], width: int) -> None:
    lines: list[list[Image.Image]] = []
    labels: list[str] = []
    for row in rows:
        for start in range(0, len(row.pictures), width)[:GRID_ROWS]:
            shown = row.pictures[start : start + width]
            blank = [Image.new("RGB", (1, 1), "white")] * (width - len(shown))
            lines.append([*(_small(path) for _, path in shown), *blank])
            own = f"{row.number}, seed {row.seed}: {_cut(row.prompt)}" if start == 0 else shown[0][0]
            labels.append(own)
    one_line = all(len(row.pictures) <= width for row in rows)
    columns = [name for name, _ in rows[0].pictures[:width]] if one_line else [""] * width
    save_grid(path, lines, labels, columns, "")


def _cut(prompt: str) -> str:
    return prompt if len(prompt) <= LABEL else f"{prompt[:LABEL]}..."


def _small(path: Path) -> Image.Image:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((MAX_CELL, MAX_CELL), Image.Resampling.LANCZOS)
    return small


def _path(folder: Path, rows: Sequence[Row]) -> Path:
    first, last = rows[0].number, rows[-1].number
    return folder / (f"grid-{first}.png" if first == last else f"grid-{first}-{last}.png")
