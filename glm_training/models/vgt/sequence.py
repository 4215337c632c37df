"""What VGT's language model reads: left-padded prompts, then [query, latent] pairs in the order of writing.

Letters: B rows, T text tokens, L places of the latent grid in raster order, C latent channels, K keys (tokens that can
be seen). A place's rank is when it is written. Padding stands on the left, is seen by nobody, and takes no position, so
that a row is the same in every batch and the image follows the text directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm_training.utils.randomness import uniform


@dataclass(frozen=True, slots=True)
class Prompts:
    """ids, mask [B, T]: token ids, and bool, False on the padding in front. `padded`: whether there is any."""

    ids: Tensor
    mask: Tensor
    padded: bool

    @staticmethod
    def of(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None) -> Prompts:
        """Rows of token ids, filled up on the left to the longest."""
        longest = max(map(len, rows))
        ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
        mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
        padded = min(map(len, rows)) < longest
        return Prompts(torch.tensor(ids, device=device), torch.tensor(mask, device=device), padded)

    def __len__(self) -> int:
        return len(self.ids)

    def joined(self, other: Prompts) -> Prompts:
        """The rows of both, these first."""
        longest = max(self.ids.shape[1], other.ids.shape[1])
        parts = [(p.ids, p.mask, longest - p.ids.shape[1]) for p in (self, other)]
        return Prompts(
            torch.cat([F.pad(ids, (gap, 0)) for ids, _, gap in parts]),
            torch.cat([F.pad(mask, (gap, 0), value=False) for _, mask, gap in parts]),
            self.padded or other.padded or any(gap for _, _, gap in parts),
        )

    def repeated(self, rows: int) -> Prompts:
        """The one row of these, `rows` times."""
        return Prompts(self.ids.expand(rows, -1), self.mask.expand(rows, -1), self.padded)

    def lengths(self) -> Tensor:
        """Tokens of each row without the padding [B, 1]: the position of the first query."""
        return self.mask.sum(1, keepdim=True)


def raster_order(places: int) -> Tensor:
    """Places in the order of writing, row by row: long [L]."""
    return torch.arange(places)


def random_orders(run_seed: int, purpose: str, names: Sequence[tuple[int, ...]], places: int) -> Tensor:
    """Places in random orders of writing, long [len(names), L]; order i is named by ``names[i]`` and nothing else."""
    return uniform(run_seed, purpose, names, (places,)).argsort(dim=1, stable=True)


def orders_of_rows(order: Tensor, rows: int, places: int) -> Tensor:
    """`order` [L], or one of each row [B, L], as [B, L]. Raises ValueError for another shape."""
    if order.shape not in ((places,), (rows, places)):
        raise ValueError(f"order must be [{places}] or [{rows}, {places}], got {list(order.shape)}")
    return order.expand(rows, places)


def written(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens [B or 1, L, C] in raster order, as they are written: [B, L, C]. `order` long [B, L]."""
    tokens = tokens.expand(len(order), -1, -1)
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))


def raster(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens [B, L, C] in the order of writing, in raster order again: the inverse of `written`."""
    return written(tokens, order.argsort(dim=1))


def interleaved(queries: Tensor, latents: Tensor) -> Tensor:
    """[q1, z1, q2, z2, ...]: [B, 2k, H] of queries and latents [B, k, H]."""
    return torch.stack([queries, latents], dim=2).flatten(1, 2)


def sequence_positions(mask: Tensor, image_tokens: int) -> Tensor:
    """Positions long [B, T + image_tokens] of left-padded text and what follows: cumsum(mask) - 1, 0 on the padding."""
    return F.pad(mask, (0, image_tokens), value=True).cumsum(1).sub(1).clamp(min=0)


def visible_keys(
    prompts: Prompts, cached: int, read: int, queries: int = 0, *, queries_see_each_other: bool = True
) -> Tensor | None:
    """What each of `read` tokens and of `queries` parallel queries behind them sees: bool [B or 1, 1, read + queries,
    K], True where it may look, K = cached + read + queries; None where that is everything before it and no cache.

    Everything before it but the padding; of its fellow queries those before it, or with `queries_see_each_other` False
    none. The keys begin with the whole text: the `cached` ones, or those that are read now.
    """
    tokens = read + queries
    if not prompts.padded and not cached and (queries_see_each_other or queries < 2):
        return None
    device = prompts.mask.device
    square = torch.ones(tokens, cached + tokens, dtype=torch.bool, device=device).tril(cached)
    own = square.triu(cached)
    if not queries_see_each_other:
        square[read:, cached + read :] = own[read:, cached + read :]
    if not prompts.padded:
        return square[None, None]
    real = F.pad(prompts.mask, (0, cached + tokens - prompts.mask.shape[1]), value=True)
    # padding looks at itself: a softmax over nothing is not a number
    return square & real[:, None, None, :] | own


def group_sizes(places: int, acc_ratio: int) -> list[int]:
    """How many places each step of parallel decoding writes: max(1, L // acc_ratio) groups, the first ones one larger.

    Raises ValueError for acc_ratio < 1.
    """
    if acc_ratio < 1:
        raise ValueError(f"acc_ratio must be at least 1, got {acc_ratio}")
    groups = max(1, places // acc_ratio)
    size, larger = divmod(places, groups)
    return [size + 1] * larger + [size] * (groups - larger)
