"""Images to prior tokens: the AR half's frozen vision tower and VQ codebook, run on whole batches.

A ViT with 16 px patches sees the image at half resolution, so one of its patches covers 32 px of the image; each patch
becomes the nearest code. The stock path resizes by rules of its own (sides of 512 px at least), and tokenises image by
image; here the grid is given, and images of one grid share one pass. With equal pixels the tokens are equal.

B images, C or D channels of the vision tower.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers import GlmImageForConditionalGeneration, GlmImageImageProcessor
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionBlock, GlmImageVisionModel

from glm_training.models.glm_image.ar_types import Grid

TOKENS_PER_PASS = 4096
"""Image tokens encoded at once: bounds the distances to the codebook (16384 codes: 256 MiB in fp32)."""


def vision_pixels(images: Tensor, grid: Grid, image_processor: GlmImageImageProcessor) -> Tensor:
    """uint8 [B, 3, 16*rows, 16*columns]: float images [B, 3, H, W] in [0, 1] as the vision tower sees them for `grid`.

    Goes through 8 bits and the processor's own filter, as an image from a file does in the stock path.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    size = [side * image_processor.patch_size for side in grid]
    interpolation = pil_torch_interpolation_mapping[image_processor.resample]
    return tvF.resize(pixels, size, interpolation=interpolation, antialias=True)


@torch.no_grad()
def tokenize_images(
    model: GlmImageForConditionalGeneration, image_processor: GlmImageImageProcessor, images: Tensor, grid: Grid
) -> Tensor:
    """VQ ids [B, rows*columns] long of float images [B, 3, H, W] in [0, 1], resized so that they fill `grid`.

    Independent of autocast and of the batch an image sits in. Raises `ValueError` for a wrong shape or an empty grid.
    """
    if min(grid) < 1:
        raise ValueError(f"grid must have at least one row and column, got {grid}")
    cells = grid[0] * grid[1]
    device = model.model.visual.patch_embed.proj.weight.device
    tokens = []
    with torch.autocast(device.type, enabled=False):
        for chunk in vision_pixels(images.to(device), grid, image_processor).split(max(1, TOKENS_PER_PASS // cells)):
            batch = image_processor(list(chunk), do_resize=False, return_tensors="pt")
            features = _vision_features(model.model.visual, batch["pixel_values"].to(device), grid)
            tokens.append(model.model.vqmodel.encode(features).image_tokens.view(-1, cells))
    return torch.cat(tokens)


def _vision_features(visual: GlmImageVisionModel, pixel_values: Tensor, grid: Grid) -> Tensor:
    """[B, C, rows, columns] features of B images of one grid, whose patches [B*rows*columns, 3*16*16] are packed.

    The modules of the stock tower, without its loop over images inside the attention.
    """
    rows, columns = grid
    hidden = visual.patch_embed(pixel_values.to(visual.dtype))
    hidden = hidden.view(-1, rows * columns, hidden.shape[-1])
    hidden = hidden + _position_embedding(visual, grid, hidden)
    for block in cast("list[GlmImageVisionBlock]", list(visual.blocks)):
        hidden = hidden + _vision_attention(block, block.norm1(hidden))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return hidden.transpose(1, 2).reshape(-1, hidden.shape[-1], rows, columns)


def _position_embedding(visual: GlmImageVisionModel, grid: Grid, like: Tensor) -> Tensor:
    """[rows*columns, D]: what the stock embeddings add to the patches of one image."""
    rows, columns = grid
    cell = torch.arange(rows * columns, device=like.device)
    return visual.embeddings(
        like.new_zeros(rows * columns, like.shape[-1]),
        torch.tensor([rows * columns], device=like.device),
        torch.tensor([[1, rows, columns]], device=like.device),
        cell.div(columns, rounding_mode="floor"),
        cell.remainder(columns),
    )


def _vision_attention(block: GlmImageVisionBlock, hidden: Tensor) -> Tensor:
    attention = block.attn
    batch, length, _ = hidden.shape
    qkv = attention.qkv(hidden).view(batch, length, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
