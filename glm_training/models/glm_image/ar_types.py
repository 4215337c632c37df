"""What the AR half takes and gives: prompts ready for the language model, and the tokens it wrote for them.

Letters in shapes: P prompts, N plans per prompt, B = P*N rows (prompt-major: row p*N + n), Lp prompt length after left
padding, T generated tokens, K codebook size, H x W the large grid in tokens (one token covers 32x32 px).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int]
"""(rows, columns) of image tokens."""


@dataclass(frozen=True)
class EncodedSources:
    """Source images of P prompts, one each and all of one size, as both halves read them.

    tokens   [P, h*w] long VQ ids of the grid (h, w) = (height / 32, width / 32)
    latents  [P, C, height / 8, width / 8] fp32, normalised; None where the DiT half is not asked
    """

    tokens: Tensor
    grid: Grid
    latents: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


Sources = Tensor | EncodedSources
"""Source images, as pixels [P, 3, H, W] in [0, 1] or encoded."""


@dataclass
class ARPrompt:
    """Encoded prompts with every position the model will need: the vision tower is not needed again.

    input_ids            [P, Lp] long, left-padded; the source image's placeholders are already its VQ ids
    attention_mask       [P, Lp] long, 0 on the padding
    position_ids         [3, P, Lp] long: time, row, column (M-RoPE); 1 on the padding, as the stock model has it
    decode_position_ids  [3, P, T] long, of the tokens to be written
    grids                grids to be written, in that order: (preview, large) for t2i, (large,) for i2i
    preview_length       tokens of the preview grid, 0 for i2i
    source_tokens        [P, h*w] long VQ ids of the source image, None for t2i
    source_grid          (h, w) of the source image, None for t2i
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    decode_position_ids: Tensor
    grids: tuple[Grid, ...]
    preview_length: int
    source_tokens: Tensor | None = None
    source_grid: Grid | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def T(self) -> int:
        """Number of tokens to write, all grids together."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def large_grid(self) -> Grid:
        """(H, W) = image size // 32: the grid the DiT is conditioned on."""
        return self.grids[-1]

    @property
    def padded(self) -> bool:
        """Whether any row carries padding."""
        return not bool(self.attention_mask.all())

    def trimmed(self) -> tuple[ARPrompt, bool]:
        """The prompts without the places that are padding in every row, and whether any row still carries some. What
        the model says of a prompt does not depend on its padding; without it, attention is plainly causal."""
        least, most = torch.stack((1 - self.attention_mask).sum(1).aminmax()).tolist()  # one wait for the device
        trimmed = replace(
            self,
            input_ids=self.input_ids[:, least:],
            attention_mask=self.attention_mask[:, least:],
            position_ids=self.position_ids[:, :, least:],
        )
        return trimmed, most > least

    def select(self, rows: Tensor) -> ARPrompt:
        """The prompts at `rows` (long indices or bool mask over P), in that order; an index may repeat."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            position_ids=self.position_ids[:, rows],
            decode_position_ids=self.decode_position_ids[:, rows],
            source_tokens=None if self.source_tokens is None else self.source_tokens[rows],
        )

    def repeat_interleave(self, times: int) -> ARPrompt:
        """Each prompt `times` times in a row: P prompts become the P*times rows of a rollout."""
        return self.select(torch.arange(len(self), device=self.input_ids.device).repeat_interleave(times))

    def to(self, device: torch.device | str) -> ARPrompt:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            decode_position_ids=self.decode_position_ids.to(device),
            source_tokens=None if self.source_tokens is None else self.source_tokens.to(device),
        )


@dataclass
class ARRollout:
    """Tokens the model wrote, and what is needed to score them again exactly as they were drawn.

    prompt       the prompts, one row per sample (B rows)
    tokens       [B, T] long in [0, K)
    log_probs    [B, T] fp32, of the temperature-scaled distribution over the codebook, renormalised over the support
    support      [B, T, ceil(K/8)] uint8, the codes top-p kept, one bit each; None when top-p was 1
    temperature  what the logits were divided by
    """

    prompt: ARPrompt
    tokens: Tensor
    log_probs: Tensor
    support: Tensor | None
    temperature: float

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def large_tokens(self) -> Tensor:
        """[B, H*W] the large grid in raster order: the prior tokens of the DiT."""
        return self.tokens[:, self.prompt.preview_length :]

    def select(self, rows: Tensor) -> ARRollout:
        """The samples at `rows` (long indices or bool mask over B), in that order."""
        return replace(
            self,
            prompt=self.prompt.select(rows),
            tokens=self.tokens[rows],
            log_probs=self.log_probs[rows],
            support=None if self.support is None else self.support[rows],
        )

    def to(self, device: torch.device | str) -> ARRollout:
        return replace(
            self,
            prompt=self.prompt.to(device),
            tokens=self.tokens.to(device),
            log_probs=self.log_probs.to(device),
            support=None if self.support is None else self.support.to(device),
        )
