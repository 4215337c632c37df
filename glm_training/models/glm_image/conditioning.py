"""Putting a `DiTCondition` together from checked parts, and taking rows of it back to "no condition".

Letters in shapes: `dit_types`; E tokens of the empty glyph text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pad

from glm_training.models.glm_image.ar_types import EncodedSources
from glm_training.models.glm_image.dit_types import DiTCondition, SourceCondition
from glm_training.models.glm_image.latents import upsample_tokens

TOKEN_PIXELS = 32
"""Side of the square of pixels one prior token stands for."""


def check_tokens(name: str, tokens: Tensor, grid: tuple[int, int], codebook: int) -> None:
    """Raise ValueError unless `tokens` is ``[B, rows * columns]`` of image codes in [0, codebook)."""
    if tokens.ndim != 2 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{name} must be [B, {grid[0] * grid[1]}] for grid {grid}, got {list(tokens.shape)}")
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= codebook:
        raise ValueError(
            f"{name} must be image codes in [0, {codebook}), got ids in [{low}, {high}]: end-of-image and reserved "
            "ids are not codes; slice the logits to the codebook when sampling"
        )


def check_sources(prompts: int, sources: Tensor, tokens: Tensor, grid: tuple[int, int], codebook: int) -> None:
    """Raise ValueError unless sources ``[P, 3, H, W]`` and tokens ``[P, h * w]`` of grid (h, w) fit together."""
    if len(sources) != prompts or len(tokens) != prompts:
        raise ValueError(
            f"need one source and one row of source_tokens for each of {prompts} prompts, "
            f"got {len(sources)} and {len(tokens)}"
        )
    if tuple(sources.shape[2:]) != (grid[0] * TOKEN_PIXELS, grid[1] * TOKEN_PIXELS):
        raise ValueError(
            f"sources of {list(sources.shape[2:])} px do not match source_grid {grid}: a token covers "
            f"{TOKEN_PIXELS}x{TOKEN_PIXELS} px; resize the sources to multiples of {TOKEN_PIXELS} before tokenizing"
        )
    check_tokens("source_tokens", tokens, grid, codebook)


def source_condition(prompts: int, sources: EncodedSources, codebook: int, device: torch.device) -> SourceCondition:
    """The sources of that many prompts, on the device. Raises ValueError where they do not fit."""
    if sources.latents is None or len(sources.latents) != prompts or len(sources) != prompts:
        raise ValueError(f"need latents and tokens of one source for each of {prompts} prompts, got {len(sources)}")
    check_tokens("source_tokens", sources.tokens, sources.grid, codebook)
    rows = torch.arange(prompts, device=device)
    return SourceCondition(sources.latents.to(device), sources.tokens.to(device), sources.grid, rows)


def build_condition(
    prior_tokens: Tensor, grid: tuple[int, int], glyph: Tensor, glyph_mask: Tensor, source: SourceCondition | None
) -> DiTCondition:
    """P prompts' glyphs ``[P, G, D]`` and sources, spread over the B = P * N prompt-major rows of `prior_tokens`."""
    prompts, device = len(glyph), prior_tokens.device
    plans, rest = divmod(len(prior_tokens), prompts)
    if rest or not plans:
        raise ValueError(f"prior_tokens must have the same number of rows for each of {prompts} prompts")
    rows = torch.arange(prompts, device=device).repeat_interleave(plans)
    return DiTCondition(
        prior_tokens=prior_tokens,
        grid=grid,
        glyph=glyph.to(device)[rows],
        glyph_mask=glyph_mask.to(device)[rows],
        height=grid[0] * TOKEN_PIXELS,
        width=grid[1] * TOKEN_PIXELS,
        source=None if source is None else source.select(rows),
    )


def drop_rows(condition: DiTCondition, drop: Tensor, empty: Tensor) -> DiTCondition:
    """`condition`, unconditional in the rows where `drop` ``[B]`` bool is True; `empty` ``[1, E, D]`` encodes ""."""
    drop = drop.to(condition.prior_tokens.device)
    if drop.shape != (condition.batch_size,) or drop.dtype != torch.bool:
        raise ValueError(f"drop must be bool [{condition.batch_size}], got {drop.dtype} {list(drop.shape)}")
    length = max(condition.glyph.shape[1], empty.shape[1])
    glyph = pad(condition.glyph, (0, 0, 0, length - condition.glyph.shape[1]))
    mask = pad(condition.glyph_mask, (0, length - condition.glyph_mask.shape[1]))
    nothing = pad(empty.to(glyph), (0, 0, 0, length - empty.shape[1]))
    changed = replace(
        condition,
        glyph=torch.where(drop[:, None, None], nothing, glyph),
        glyph_mask=torch.where(drop[:, None], torch.arange(length, device=mask.device) < empty.shape[1], mask),
        dropped=drop if condition.dropped is None else drop | condition.dropped,
    )
    return changed.select(torch.arange(condition.batch_size, device=mask.device))  # cuts the glyphs to the longest


class PriorEmbedding(nn.Embedding):
    """The embedding of prior tokens, which is zero for an id that is dropped: written as ~id, below zero.

    The stock transformer zeroes by a boolean index, `prior_embedding[drop] *= 0`: the host waits for the device to
    count the rows, and without numbers (fake tensors, graphs) there is no shape. A multiplication by 0 or 1 gives the
    same values and gradients, bit for bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        dropped = input < 0
        return super().forward(torch.where(dropped, ~input, input)) * ~dropped[..., None]


def install_prior_drop(transformer: GlmImageTransformer2DModel) -> None:
    """Give it a :class:`PriorEmbedding` around the weight that it has."""
    stock = transformer.prior_token_embedding
    ours = PriorEmbedding(stock.num_embeddings, stock.embedding_dim, device="meta")
    ours.weight = stock.weight
    transformer.prior_token_embedding = ours.train(stock.training)


def prior_arguments(tokens: Tensor, grid: tuple[int, int], dropped: Tensor | None = None) -> dict[str, Any]:
    """What the transformer takes of prior tokens ``[B, rows * columns]``, none of them in the rows where `dropped`
    ``[B]`` bool is True. Its own dropping gets no rows to drop."""
    ids = upsample_tokens(tokens, grid)
    if dropped is not None:
        ids = torch.where(dropped[:, None], ~ids, ids)
    return {"prior_token_id": ids, "prior_token_drop": slice(0, 0)}
