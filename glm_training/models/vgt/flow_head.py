"""VGT's flow head: the velocity of one noisy latent token, from its noise level and the language model's condition.

An MLP with adaptive LayerNorm, as MAR's diffusion head (arXiv:2406.11838). Letters: *dims any leading dimensions, C
latent channels, H width of the condition, W width of the head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 128
"""Of the time embedding: a cosine and a sine each, 256 numbers."""

NORM_EPS = 1e-6


def time_features(times: Tensor) -> Tensor:
    """[*dims, 256] fp32: cos(t f_i), then sin(t f_i), f_i = 10000^(-i / 128), of raw `times` [*dims] in [0, 1]."""
    exponents = torch.arange(FREQUENCIES, dtype=torch.float32, device=times.device) / FREQUENCIES
    angles = times.float()[..., None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class HeadBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), the three linear in the activated embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(embedding).chunk(3, dim=-1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)


class FlowHead(nn.Module):
    """Every token by itself. Its velocity is 0 at first: modulations and last layer start at 0."""

    def __init__(self, latent_channels: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.latent_in = nn.Linear(latent_channels, width)
        self.condition_in = nn.Linear(condition_width, width)
        self.time_mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        blocks = [HeadBlock(width) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, latent_channels)
        self._initialise([self.out, self.modulation, *(block.modulation for block in blocks)])

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(velocity [*dims, C] fp32, hidden features [*dims, W] after half of the blocks) of tokens `noisy` [*dims, C]
        at `times` [*dims] under `condition` [*dims, H]."""
        dtype = self.out.weight.dtype
        embedding = self.time_mlp(time_features(times).to(dtype)) + self.condition_in(condition.to(dtype))
        embedding = F.silu(embedding)  # once: every modulation begins with it
        hidden = features = self.latent_in(noisy.to(dtype))
        for number, block in enumerate(self.blocks, start=1):
            hidden = block(hidden, embedding)
            if number == max(1, len(self.blocks) // 2):
                features = hidden
        shift, scale = self.modulation(embedding).chunk(2, dim=-1)
        hidden = F.layer_norm(hidden, (self.width,), eps=NORM_EPS) * (1 + scale) + shift
        return self.out(hidden).float(), features

    def _initialise(self, zero: list[nn.Linear]) -> None:
        """Xavier, the time MLP normal .02, the layers `zero` 0. Draws from torch's generator."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        for part in self.time_mlp:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
        for layer in zero:
            nn.init.zeros_(layer.weight)
