"""Drawing latents with VGT's generator: groups of places, one call of the language model for each.

A call reads the [query, latent] pairs of the group before, as training has them, and the queries of the group that is
to be written, each at the position that training gives it. Afterwards the cache forgets those queries but the first,
whose latent follows it directly in training too. So the cache holds at every time what training would have read.

Letters: B images, R rows in the language model (2 B with guidance), k places of a group, L places, N steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from glm_training.algorithms.flow_tokens import channel_norm, guidance_weight, integrate
from glm_training.models.library_versions import with_cache
from glm_training.models.lora import without_dropout
from glm_training.models.vgt.generator import Generator
from glm_training.models.vgt.sequence import (
    Prompts,
    group_sizes,
    interleaved,
    orders_of_rows,
    raster,
    sequence_positions,
    visible_keys,
    written,
)

GUIDANCE = 4.5
"""Published strength of classifier-free guidance at the first group; it fades to almost 1."""


@torch.no_grad()
def sample(
    generator: Generator,
    prompts: Prompts,
    noise: Tensor,
    order: Tensor,
    *,
    guidance: float = GUIDANCE,
    acc_ratio: int = 1,
    queries_see_each_other: bool = False,
    on_group: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] fp32 of images for `prompts`, normed over the channels where the autoencoder's are.

    `noise` standard normal [B, N, C, h, w] sets the grid and the number of steps of every token (published: 30, and 100
    for DPG); `order` long [L] or [B, L] says in which order the places are written. A row depends on its own prompt,
    noise and order alone. With `guidance` 1 the unconditional text is not read. `acc_ratio` places are written at once,
    L // acc_ratio calls of the language model in all; whether a query then sees those of its group that come before it
    is `queries_see_each_other` (acc_ratio 1 knows no difference). Training shows no query without its latent: a tiny
    model draws more pictures right where they are hidden (docs/vgt.md). `on_group(g)` is called before each group after
    the first, and may raise to abandon the drawing.

    Raises ValueError for shapes, an order that leaves places out or settings out of range, and FloatingPointError for
    latents that are not finite.
    """
    rows, _, channels, *grid = _checked(generator, prompts, noise, order)
    order = orders_of_rows(order.to(generator.device), rows, grid[0] * grid[1])
    noise = written(noise.to(generator.device).movedim(2, -1).flatten(2, 3).transpose(1, 2).flatten(2), order)
    noise = noise.unflatten(2, (-1, channels)).permute(2, 0, 1, 3)  # [N, B, L, C] in the order of writing
    guided = guidance != 1
    if guided:
        prompts = prompts.joined(generator.encode_prompts([""]).repeated(rows))
    sizes = group_sizes(order.shape[1], acc_ratio)
    with without_dropout(generator):
        writer = Writer(generator, prompts, order.repeat(2, 1) if guided else order, (grid[0], grid[1]))
        tokens = []
        for group, draws in enumerate(noise.split(sizes, dim=2)):
            if group and on_group is not None:
                on_group(group)
            condition = writer.conditions(sizes[group], queries_see_each_other=queries_see_each_other)
            weight = guidance_weight(guidance, group, len(sizes)) if guided else None
            drawn = integrate(_velocity(generator, condition, weight), draws)
            if generator.config.latent_norm:
                drawn = channel_norm(drawn, dim=-1)
            writer.write(drawn.repeat(2, 1, 1) if guided else drawn)
            tokens.append(drawn)
    latents = raster(torch.cat(tokens, dim=1), order).transpose(1, 2).unflatten(2, (grid[0], grid[1]))
    if not bool(torch.isfinite(latents).all()):
        raise FloatingPointError("the generator drew latents that are not finite numbers")
    return latents


class Writer:
    """Writes R sequences group by group with one key/value cache: `conditions` of the next places, then `write` them.

    Gradients flow from conditions to the latents written before, unless the caller turns them off.
    """

    def __init__(self, generator: Generator, prompts: Prompts, order: Tensor, grid: tuple[int, int]) -> None:
        """`order` long [R, L]."""
        self._generator = generator
        self._prompts = prompts
        queries, embeddings = generator.grids(grid)
        self._queries, self._embeddings = written(queries, order), written(embeddings, order)
        self._positions = sequence_positions(prompts.mask, 2 * order.shape[1])
        self._unread = generator.embed_text(prompts)  # [R, *, H]: what the next call reads before its queries
        self._read = 0  # tokens in the cache
        self._rank = 0  # of the first place of the group
        self._group = 0  # its places
        self._cache = DynamicCache()

    def conditions(self, group: int, *, queries_see_each_other: bool = False) -> Tensor:
        """Conditions [R, group, H] of the next `group` places, in the order of writing. One call of the language
        model."""
        start = self._rank
        queries = self._queries[:, start : start + group]
        unread = self._unread.shape[1]
        hidden = self._generator.llm(
            inputs_embeds=torch.cat([self._unread, queries], dim=1),
            attention_mask={
                "full_attention": visible_keys(
                    self._prompts, self._read, unread, group, queries_see_each_other=queries_see_each_other
                )
            },
            position_ids=torch.cat(
                [
                    self._positions[:, self._read : self._read + unread],
                    self._positions[:, self._text + 2 * start :: 2][:, :group],
                ],
                dim=1,
            ),
            **with_cache(self._generator.llm, self._cache),
        ).last_hidden_state[:, unread:]
        self._cache.crop(1 - group)
        self._read += unread + 1
        self._group = group
        return self._generator.condition_out(hidden)

    def write(self, tokens: Tensor) -> None:
        """Latents [R, group, C] of the places whose conditions were given last."""
        places = slice(self._rank, self._rank + self._group)
        embedded = self._generator.embed_latents(tokens, self._embeddings[:, places])
        self._unread = interleaved(self._queries[:, places], embedded)[:, 1:]  # the first query is in the cache
        self._rank += self._group

    @property
    def _text(self) -> int:
        return self._prompts.ids.shape[1]


def _velocity(generator: Generator, condition: Tensor, weight: float | None) -> Callable[[Tensor, float], Tensor]:
    """The head under `condition` [R, k, H] as a function of (x_t [B, k, C], t); with a `weight` guided, the conditional
    rows first."""

    def velocity(state: Tensor, time: float) -> Tensor:
        if weight is not None:
            state = state.repeat(2, 1, 1)
        times = torch.full(state.shape[:-1], time, device=state.device)
        predicted: Tensor = generator.head(state, times, condition)[0]
        if weight is None:
            return predicted
        with_text, without = predicted.chunk(2)
        return without + weight * (with_text - without)

    return velocity


def _checked(generator: Generator, prompts: Prompts, noise: Tensor, order: Tensor) -> tuple[int, ...]:
    channels = generator.config.latent_channels
    if noise.ndim != 5 or (noise.shape[0], noise.shape[2]) != (len(prompts), channels):
        raise ValueError(
            f"noise must be [{len(prompts)}, steps, {channels}, h, w], one for each prompt; got {list(noise.shape)}"
        )
    places = noise.shape[3] * noise.shape[4]
    orders = orders_of_rows(order, len(noise), places)
    if not torch.equal(orders.sort(dim=1).values, torch.arange(places, device=order.device).expand_as(orders)):
        raise ValueError(f"order must hold each of the {places} places once")
    return tuple(noise.shape)
