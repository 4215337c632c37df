"""What is compared, pixel by pixel: pictures brought to one size, PSNR and the two readings of SSIM.

Pictures are [B, 3, H, W] in [0, 1], any device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from glm_training.rewards.structure import ssim
from glm_training.rewards.types import from_pil

PUBLISHED_RANGE = 2.0
"""The data range that published evaluations pass to SSIM for pictures in [0, 1], which makes it larger."""


def squashed(image: Image.Image, side: int) -> Tensor:
    """[1, 3, side, side] fp32 of a picture of any shape: both sides to `side`, bilinear as Pillow does it (which
    averages where it shrinks), rounded to 8 bits."""
    return from_pil(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def resized(images: Tensor, side: int) -> Tensor:
    """[B, 3, side, side], bilinear between the four nearest pixels: how published evaluations bring 448 px to 256."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def mean_squared_error(images: Tensor, references: Tensor) -> Tensor:
    """[B] fp64. Raises ValueError when the sizes differ."""
    if images.shape != references.shape:
        raise ValueError(f"pictures of two sizes: {list(images.shape)} and {list(references.shape)}")
    return (images.double() - references.double()).square().mean(dim=(1, 2, 3))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1] with a mean squared `error`: -10 log10(error), infinite
    for none."""
    return -10 * math.log10(error) if error > 0 else math.inf


def similarities(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM [B] fp64 with the pictures' own range, and with `PUBLISHED_RANGE`. Raises ValueError as `ssim` does."""
    with torch.no_grad():
        return ssim(images, references), ssim(images, references, PUBLISHED_RANGE)
