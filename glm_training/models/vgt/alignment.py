"""The vision encoder that REPA aligns the flow head with (arXiv:2410.06940): DINOv3, or a ViT of its interface."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from glm_training.models.loading import load_errors_explained

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AlignmentTeacher(nn.Module):
    """A frozen vision encoder, always in evaluation mode, whose patches are the places of the latents."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype) -> Self:
        """Raises ModelLoadError."""
        with load_errors_explained(f"the vision encoder in {folder}"):
            return cls(AutoModel.from_pretrained(folder, dtype=dtype))

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h * w, R] of images [B, 3, H, W] in [0, 1], one for each place of `grid` (h, w) in raster order."""
        settings: Any = self.encoder.config
        patch: int = settings.patch_size
        size = (grid[0] * patch, grid[1] * patch)
        small = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        seen = ((small - self.mean) / self.std).to(next(self.encoder.parameters()).dtype)
        # what is in front of the patches: the class token, and registers where there are any
        return self.encoder(pixel_values=seen).last_hidden_state[:, -grid[0] * grid[1] :]

    def train(self, mode: bool = True) -> Self:
        return super().train(False)
