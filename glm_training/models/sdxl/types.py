"""What an SDXL UNet is conditioned on: B rows, D1 and D2 the widths of the two text encoders, P that of pooled text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Size = tuple[int, int]
"""(height, width), or for a crop (top, left), in pixels."""


@dataclass(frozen=True)
class SDXLText:
    """B encoded prompts.

    prompt_embeds: ``[B, 77, D1 + D2]`` (2048 in SDXL), the second-to-last hidden states of both text encoders side by
    side. pooled: ``[B, P]`` (1280), the projected end-of-text state of the second encoder.
    """

    prompt_embeds: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.prompt_embeds.ndim != 3 or self.pooled.ndim != 2 or len(self.prompt_embeds) != len(self.pooled):
            raise ValueError(
                "an SDXLText needs prompt_embeds [B, tokens, D] and pooled [B, P], got "
                f"{list(self.prompt_embeds.shape)} and {list(self.pooled.shape)}"
            )

    def __len__(self) -> int:
        return len(self.pooled)

    def select(self, rows: Tensor | slice) -> SDXLText:
        """The given rows (long indices, a bool mask or a slice)."""
        return SDXLText(self.prompt_embeds[rows], self.pooled[rows])

    def repeat_interleave(self, count: int) -> SDXLText:
        """Every row `count` times, prompt-major."""
        return SDXLText(self.prompt_embeds.repeat_interleave(count, 0), self.pooled.repeat_interleave(count, 0))

    def zeros(self) -> SDXLText:
        """As many rows of zeros: the negative prompt SDXL was trained with."""
        return SDXLText(torch.zeros_like(self.prompt_embeds), torch.zeros_like(self.pooled))

    def to(self, device: torch.device | str) -> SDXLText:
        return SDXLText(self.prompt_embeds.to(device), self.pooled.to(device))

    @staticmethod
    def cat(parts: Sequence[SDXLText]) -> SDXLText:
        """The rows of all `parts`, in order."""
        return SDXLText(torch.cat([part.prompt_embeds for part in parts]), torch.cat([part.pooled for part in parts]))


@dataclass(frozen=True)
class UNetCondition:
    """Everything but latents and time that the prediction for B images depends on.

    time_ids: ``[B, 6]`` fp32 from `add_time_ids`. negative: what guidance leads away from, B rows; None for what the
    stock pipeline takes without a negative prompt.
    """

    text: SDXLText
    time_ids: Tensor
    negative: SDXLText | None = None

    def __len__(self) -> int:
        return len(self.text)

    def select(self, rows: Tensor | slice) -> UNetCondition:
        """The given rows (long indices, a bool mask or a slice)."""
        negative = None if self.negative is None else self.negative.select(rows)
        return UNetCondition(self.text.select(rows), self.time_ids[rows], negative)

    def to(self, device: torch.device | str) -> UNetCondition:
        negative = None if self.negative is None else self.negative.to(device)
        return UNetCondition(self.text.to(device), self.time_ids.to(device), negative)


def add_time_ids(
    original_size: Size | Sequence[Size] | Tensor,
    crop: Size | Sequence[Size] | Tensor,
    target_size: Size | Sequence[Size] | Tensor,
    rows: int | None = None,
) -> Tensor:
    """SDXL's micro-conditioning ``[B, 6]`` fp32: original (height, width), crop (top, left), target (height, width).

    Each is one pair for all rows, or one per row. `rows` is B when all three are single pairs (1 without it). The
    original size is that of the file before resizing; crop counts pixels cut off after it. Raises ValueError when the
    counts do not agree.
    """
    given = (("original_size", original_size), ("crop", crop), ("target_size", target_size))
    pairs = []
    for name, value in given:
        pair = torch.as_tensor(value, dtype=torch.float32)
        if pair.ndim == 1:
            pair = pair[None]
        if pair.ndim != 2 or pair.shape[1] != 2 or not len(pair):
            raise ValueError(f"{name} must be one pair of numbers or [B, 2], got {list(pair.shape)}")
        pairs.append(pair)
    counts = {len(pair) for pair in pairs if len(pair) > 1} | ({rows} if rows is not None else set())
    if len(counts) > 1:
        raise ValueError(f"original_size, crop, target_size and rows must agree in B, got {sorted(counts)}")
    batch = counts.pop() if counts else 1
    return torch.cat([pair.expand(batch, 2) for pair in pairs], dim=1)
