"""The discriminator of VGT's autoencoder: does each patch of a picture look real?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 32


class Blur(nn.Module):
    """Halves both sides with the kernel (1, 3, 3, 1) x (1, 3, 3, 1) / 64: what is smaller than a pixel afterwards is
    smoothed away before it is dropped (arXiv:1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, ceil(H / 2), ceil(W / 2)]."""
        channels, height, width = x.shape[1:]
        # zeros around: one on each side, one more at the end of an odd side
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 4, 4), stride=2, groups=channels)


class PatchDiscriminator(nn.Module):
    """Convolutions that halve the sides at each of `stages`, pooled to 16 x 16 places, one logit a place.

    hidden_channels: of the first stage, a multiple of 32; each later stage has twice those before. Random weights
    depend on `seed` alone. The published one has 128 and three stages.
    """

    def __init__(self, hidden_channels: int = 128, stages: int = 3, *, seed: int = 0) -> None:
        if hidden_channels < 1 or hidden_channels % _GROUPS or stages < 1:
            raise ValueError(
                f"hidden_channels must be a multiple of {_GROUPS} and stages at least 1, "
                f"got {hidden_channels}, {stages}"
            )
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
            torch.default_generator.manual_seed(seed)
            self.first = nn.Sequential(nn.Conv2d(3, hidden_channels, 5, padding=2), nn.LeakyReLU(0.1))
            width, blocks = hidden_channels, []
            for stage in range(stages):
                out = hidden_channels * 2**stage
                blocks.append(
                    nn.Sequential(
                        nn.Conv2d(width, out, 3, padding=1), Blur(), nn.GroupNorm(_GROUPS, out), nn.LeakyReLU(0.1)
                    )
                )
                width = out
            self.stages = nn.Sequential(*blocks)
            self.logits = nn.Sequential(
                nn.AdaptiveMaxPool2d(16),
                nn.Conv2d(width, width, 1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(width, 1, 5, padding=2),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 1, 16, 16] of images [B, 3, H, W] in [0, 1], above 0 for what looks real."""
        return self.logits(self.stages(self.first(images)))
