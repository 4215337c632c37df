"""Grids and M-RoPE positions of GLM-Image's AR half, for whole batches at once.

Text advances all three axes (time, row, column) together. A grid of image tokens that starts at position b has
time = b, row = b + i, column = b + j, and whatever follows it starts at b + max(rows, columns). The stock model
computes this per sample and caches it on itself; here positions are values that are passed. Letters in
shapes: `ar_types`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from glm_training.models.glm_image.ar_types import Grid

TOKEN_PIXELS = 32
"""Side of the square that one prior token covers, in px."""

Mode = Literal["t2i", "i2i"]


def image_grid(height: int, width: int) -> Grid:
    """Tokens (rows, columns) of an image of `height` x `width` px.

    Raises `ValueError` unless both are positive multiples of 32.
    """
    for name, pixels in (("height", height), ("width", width)):
        if pixels < TOKEN_PIXELS or pixels % TOKEN_PIXELS:
            raise ValueError(f"{name} is {pixels} px; GLM-Image needs a positive multiple of {TOKEN_PIXELS} px")
    return height // TOKEN_PIXELS, width // TOKEN_PIXELS


def generation_grids(height: int, width: int, mode: Mode) -> tuple[Grid, ...]:
    """Grids the AR half writes for an image of `height` x `width` px, in writing order.

    t2i: a preview of about 16x16 tokens with the image's aspect ratio, then the large grid; i2i: the large grid only.
    """
    rows, columns = image_grid(height, width)
    if mode == "i2i":
        return ((rows, columns),)
    side = TOKEN_PIXELS // 2
    # the processor's own expressions: another order of operations can truncate differently
    preview = int(math.sqrt(rows / columns) * side), int(math.sqrt(1 / (rows / columns)) * side)
    if min(preview) < 1:
        raise ValueError(
            f"{height}x{width} px is too elongated: its preview grid would be {preview[0]}x{preview[1]} tokens"
        )
    return preview, (rows, columns)


def prompt_positions(
    input_ids: Tensor, attention_mask: Tensor, image_start_id: int, source_grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """Positions of left-padded prompts [P, Lp] with at most one source image each.

    Returns ([3, P, Lp] long, 1 on the padding as in the stock model; [P] long, the position at which writing begins).
    With a `source_grid` every row must hold one image of that grid after its first `image_start_id`.
    """
    valid = attention_mask.bool()
    index = valid.long().cumsum(1) - 1  # [P, Lp] place among the row's real tokens
    length = valid.sum(1)
    if source_grid is None:
        return _on_padding(index.expand(3, *index.shape), valid), length
    rows, columns = source_grid
    first = ((input_ids == image_start_id) & valid).long().argmax(1)
    base = index.gather(1, first[:, None]) + 1  # [P, 1] place, and position, of the first image token
    cell = index - base
    inside = (cell >= 0) & (cell < rows * columns)
    saved = rows * columns - max(rows, columns)  # positions a grid does not use up
    text = torch.where(cell >= rows * columns, index - saved, index)
    row = base + cell.div(columns, rounding_mode="floor")
    column = base + cell.remainder(columns)
    positions = torch.stack([torch.where(inside, axis, text) for axis in (base.expand_as(index), row, column)])
    return _on_padding(positions, valid), length - saved


def _on_padding(positions: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, positions, torch.ones_like(positions))


def decode_positions(start: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Positions [3, P, T] of the tokens of `grids`, written one after the other from position `start` [P] on."""
    offset = 0
    parts = []
    for rows, columns in grids:
        cell = torch.arange(rows * columns, device=start.device)
        row, column = cell.div(columns, rounding_mode="floor"), cell.remainder(columns)
        parts.append(offset + torch.stack([torch.zeros_like(cell), row, column]))
        offset += max(rows, columns)
    return start[None, :, None] + torch.cat(parts, dim=1)[:, None, :]
