"""The records every other part of the package meets: an example on disk, a picture of it, a batch in memory."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One prompt with its images.

    Attributes:
        index: zero-based line of the prompts file, also the number in the image's name; a quarantine leaves gaps.
        prompt: the text, without surrounding white space.
        target: the image rewards compare with, links resolved; None in a dataset without targets.
        source: the image to edit, links resolved; None for text-to-image.
        size: (height, width) in pixels of its images in a batch; None where all examples have one size.
    """

    index: int
    prompt: str
    target: Path | None
    source: Path | None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class View:
    """A picture as a batch shows it, whatever its name and place: what encoders give of it depends on this alone.

    Attributes:
        digest: SHA-256 (hex) of its file's bytes.
        size: (height, width) in pixels that it is resized to cover; the overhang is cut off evenly at both sides.
        flipped: mirrored left to right.
    """

    digest: str
    size: tuple[int, int]
    flipped: bool = False


@dataclass
class ImageRows:
    """Images cut to one size, with what SDXL's micro-conditioning asks of them.

    Attributes:
        pixels: float32 ``[rows, 3, H, W]`` in [0, 1].
        original_sizes: long ``[rows, 2]``, (height, width) of the upright file before resizing.
        crops: long ``[rows, 2]``, (top, left) pixels cut off after resizing.
    """

    pixels: Tensor
    original_sizes: Tensor
    crops: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int) -> "ImageRows":
        return self.rows(slice(count))

    def rows(self, which: slice) -> "ImageRows":
        return ImageRows(self.pixels[which], self.original_sizes[which], self.crops[which])


@dataclass
class Batch:
    """B examples.

    Attributes:
        indices: the dataset positions that were asked for, in order.
        prompts: B texts.
        targets: float32 ``[B, 3, H, W]`` in [0, 1], or None.
        sources: float32 ``[B, 3, H, W]`` in [0, 1], or None.
        original_sizes: long ``[B, 2]``, (height, width) of the targets' upright files before resizing; None without
            targets.
        crops: long ``[B, 2]``, (top, left) of the cut in the resized target, in pixels of that.
        target_views, source_views: B pictures as they are shown; None where the data do not know their content.
    """

    indices: list[int]
    prompts: list[str]
    targets: Tensor | None
    sources: Tensor | None
    original_sizes: Tensor | None = None
    crops: Tensor | None = None
    target_views: list[View] | None = None
    source_views: list[View] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of its pictures. Raises ``ValueError`` for a batch without any."""
        for images in (self.targets, self.sources):
            if images is not None:
                return images.shape[-2], images.shape[-1]
        for views in (self.target_views, self.source_views):
            if views:
                return views[0].size
        raise ValueError("the batch has no pictures")

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its images on ``device``; pinned images are copied asynchronously."""
        targets, sources = (
            None if images is None else images.to(device, non_blocking=images.is_pinned())
            for images in (self.targets, self.sources)
        )
        return replace(self, targets=targets, sources=sources)
