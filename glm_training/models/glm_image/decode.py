"""The AR half's own decode loop: prompts read once, one static key/value cache for the whole group, no sync per step.

The stock `generate` reads every repeated prompt again, rebuilds positions and masks at each token, and keeps state on
the module. Here each projection, norm and MLP is still the checkpoint's own module (so LoRA layers and replaced modules
act as in training), and only the thread between them is ours: the stock layer's forward with the cache, the rotary
tables and the mask laid out beforehand. What a step computes is the same whether the host says where it is (attention
then looks over the places filled so far) or the device does (over the whole cache, masked: what a CUDA graph replays).

Letters in shapes as in `ar_types`; D hidden size, R rows of a table, L its positions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmImageForConditionalGeneration
from transformers.models.glm_image.modeling_glm_image import (
    GlmImageRMSNorm,
    GlmImageTextDecoderLayer,
    GlmImageTextModel,
)

from glm_training.models.gathering import Turns
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.token_sampling import TokenSampler
from glm_training.models.lora import without_dropout

CACHE_MULTIPLE = 16
"""Caches are this many places long, or twice, ...: attention kernels of GPUs copy a mask of any other length first."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary tables that broadcast over heads. The sine's first half is negated, so that a roll stands for the
    stock `rotate_half`, with the same products and the same rounding."""

    cos: Tensor
    signed_sin: Tensor

    @staticmethod
    def of(text_model: GlmImageTextModel, like: Tensor, position_ids: Tensor) -> Rotary:
        """[R, L, 1, rotary_dim] tables for positions [3, R, L], in the dtype of `like`."""
        cos, sin = text_model.rotary_emb(like, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return Rotary(cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None])

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotates the leading rotary_dim of `heads` [..., head_dim]."""
        size, head_dim = self.cos.shape[-1], heads.shape[-1]
        part = heads if size == head_dim else heads[..., :size]
        rotated = part * self.cos + part.roll(size // 2, -1) * self.signed_sin
        return rotated if size == head_dim else torch.cat([rotated, heads[..., size:].to(rotated.dtype)], dim=-1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step writes, and what it may look at.

    index   place of the cache: the host's number, or the device's, [1] long
    rotary  tables [B or 1, 1, rotary_dim]
    length  leading places of the cache that attention looks over
    mask    additive [B or 1, 1, 1, length], None where all of them may be seen
    """

    index: int | Tensor
    rotary: Rotary
    length: int
    mask: Tensor | None


class DecoderLayer:
    """One layer of the language model with its modules looked up once, and its static cache.

    keys, values [B, kv_heads, at least Lp + T - 1, head_dim]; the first Lp places hold the prompt.
    """

    def __init__(self, layer: GlmImageTextDecoderLayer) -> None:
        attention = layer.self_attn
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj, self.mlp = attention.o_proj, layer.mlp
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.before_attention = _norm(layer.input_layernorm)
        self.after_attention = _norm(layer.post_self_attn_layernorm)
        self.before_mlp = _norm(layer.post_attention_layernorm)
        self.after_mlp = _norm(layer.post_mlp_layernorm)
        self.keys = self.values = torch.empty(0)

    def read_prompts(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, group_size: int, cache_length: int
    ) -> Tensor:
        """The layer over whole prompts, `hidden` [P, Lp, D]; fills the caches of the P * group_size samples."""
        heads, value = self._project(hidden, rotary)
        heads, value = heads.transpose(1, 2), value.transpose(1, 2)
        query, key = heads[:, : -value.shape[1]], heads[:, -value.shape[1] :]
        sharing = query.shape[1] // key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(sharing, dim=1),
            value.repeat_interleave(sharing, dim=1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
        )
        self.keys, self.values = _to_group(key, group_size, cache_length), _to_group(value, group_size, cache_length)
        return self._finish(hidden, mixed.transpose(1, 2).flatten(2))

    def step(self, hidden: Tensor, place: Place) -> Tensor:
        """The layer for one new token per sample, `hidden` [B, D]; its key and value go to `place` of the cache."""
        heads, value = self._project(hidden, place.rotary)
        rows, kv_heads, size = value.shape
        query_heads = heads.shape[1] - kv_heads
        _put(self.keys, place.index, heads.narrow(1, query_heads, kv_heads))
        _put(self.values, place.index, value)
        # query heads that share a key head stand in for a sequence: no copy of the cache per head
        mixed = F.scaled_dot_product_attention(
            heads.narrow(1, 0, query_heads).unflatten(1, (kv_heads, -1)),
            self.keys.narrow(2, 0, place.length),
            self.values.narrow(2, 0, place.length),
            attn_mask=place.mask,
            scale=self.scaling,
        )
        return self._finish(hidden, mixed.reshape(rows, query_heads * size))

    def _project(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Of `hidden` [..., D]: rotated query heads followed by key heads [..., heads + kv_heads, head_dim], and the
        value heads [..., kv_heads, head_dim]."""
        hidden = self.before_attention(hidden)
        per_head = (*hidden.shape[:-1], -1, self.head_dim)
        value = self.v_proj(hidden).view(per_head)
        heads = rotary.rotate(torch.cat((self.q_proj(hidden), self.k_proj(hidden)), dim=-1).view(per_head))
        # under autocast the fp32 tables promote; attention runs in the projections' dtype
        return heads if heads.dtype == value.dtype else heads.to(value.dtype), value

    def _finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer after attention has mixed the values."""
        hidden = residual + self.after_attention(self.o_proj(mixed))
        return hidden + self.after_mlp(self.mlp(self.before_mlp(hidden)))


class TurningLayer(DecoderLayer):
    """A layer in shards, whole while it computes: `turns` are those of the layers, `place` its own among them."""

    def __init__(self, layer: GlmImageTextDecoderLayer, turns: Turns, place: int) -> None:
        super().__init__(layer)
        self._turns, self._place = turns, place

    def read_prompts(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, group_size: int, cache_length: int
    ) -> Tensor:
        with self._turns.block(self._place):
            return super().read_prompts(hidden, rotary, mask, group_size, cache_length)

    def step(self, hidden: Tensor, place: Place) -> Tensor:
        with self._turns.block(self._place):
            return super().step(hidden, place)


class Decoding:
    """Prompts that were read, and the steps from there: T - 1 of them, the first token is drawn here.

    Under `torch.inference_mode()`, dropout off, from here to the last step.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        prompt: ARPrompt,
        group_size: int,
        sampler: TokenSampler,
        turns: Turns | None = None,
    ) -> None:
        text_model = model.model.language_model
        self.model = model
        self.sampler = sampler
        self.start = prompt.input_ids.shape[1]
        self.steps = prompt.T - 1
        self._embed, self._norm, self._head = text_model.embed_tokens, _norm(text_model.norm), model.lm_head
        layers = [cast("GlmImageTextDecoderLayer", layer) for layer in text_model.layers]
        self._layers = [
            DecoderLayer(layer) if turns is None else TurningLayer(layer, turns, place)
            for place, layer in enumerate(layers)
        ]
        length = -(-(self.start + self.steps) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        hidden = self._embed(prompt.input_ids)
        self._table = _rotary_table(text_model, hidden, prompt, group_size)
        rotary, mask = Rotary.of(text_model, hidden, prompt.position_ids), _prompt_mask(prompt)
        for layer in self._layers:
            hidden = layer.read_prompts(hidden, rotary, mask, group_size, length)
        hidden = hidden[:, -1].repeat_interleave(group_size, dim=0)  # padding is on the left: the last place is real
        self.sampler.draw(self._head(self._norm(hidden)))
        self._padding = _padding_mask(prompt, group_size, length, self._layers[0].values)
        self._nothing_masked = self._layers[0].values.new_zeros(1, 1, 1, length)
        self._places = torch.arange(length, device=hidden.device)
        self._rotaries = [
            Rotary(*pair) for pair in zip(self._table.cos.unbind(1), self._table.signed_sin.unbind(1), strict=True)
        ]

    def advance(self, step: int) -> None:
        """Step `step`, from 1 on: reads the token drawn last and draws the next."""
        index = self.start + step - 1
        mask = None if self._padding is None else self._padding.narrow(-1, 0, index + 1)
        self._write(Place(index, self._rotaries[step - 1], index + 1, mask))

    def advance_by_device(self) -> None:
        """The step that is due by what the device counted: the same tensors each time, and no word from the host."""
        row = self.sampler.step - 1
        index = row + self.start
        rotary = Rotary(self._table.cos.index_select(1, row)[:, 0], self._table.signed_sin.index_select(1, row)[:, 0])
        visible = self._nothing_masked if self._padding is None else self._padding
        mask = visible.masked_fill(self._places > index, -torch.inf)
        self._write(Place(index, rotary, len(self._places), mask))

    def _write(self, place: Place) -> None:
        hidden = self._embed(self.sampler.token).squeeze(1)
        for layer in self._layers:
            hidden = layer.step(hidden, place)
        self.sampler.draw(self._head(self._norm(hidden)))


Stepping = Callable[[Decoding], AbstractContextManager[Callable[[int], None]]]
"""How the steps of a decoding are taken: what takes step 1, step 2, ..., until the context ends."""


def write_tokens(
    model: GlmImageForConditionalGeneration,
    prompt: ARPrompt,
    group_size: int,
    sampler: TokenSampler,
    on_step: Callable[[int], None] | None = None,
    stepping: Stepping | None = None,
    turns: Turns | None = None,
) -> None:
    """Lets `sampler` draw all T tokens of `group_size` samples for each of the P prompts, prompt-major.

    `on_step` is called with the index of each token before it is computed; it may raise to abandon the rollout.
    `stepping`: see `decode_graph`; without it each step is the host's `Decoding.advance`. `turns`: of layers in shards.
    """
    with torch.inference_mode(), without_dropout(model):
        decoding = Decoding(model, prompt, group_size, sampler, turns)
        with nullcontext(decoding.advance) if stepping is None else stepping(decoding) as advance:
            for step in range(1, prompt.T):
                if on_step is not None:
                    on_step(step)
                advance(step)


def _put(cache: Tensor, index: int | Tensor, new: Tensor) -> None:
    """Writes `new` [B, kv_heads, head_dim] at a place of `cache`; a place that the host knows costs less."""
    if isinstance(index, int):
        cache.select(2, index).copy_(new)
    else:
        cache.index_copy_(2, index, new[:, :, None])


def _to_group(prompt_part: Tensor, group_size: int, length: int) -> Tensor:
    """[P*N, heads, length, head_dim] whose first places repeat [P, heads, Lp, head_dim] for each of the N samples."""
    count, heads, filled, size = prompt_part.shape
    cache = prompt_part.new_zeros(count, group_size, heads, length, size)  # a masked place still has to be a number
    cache[:, :, :, :filled] = prompt_part[:, None]
    return cache.flatten(0, 1)


def _prompt_mask(prompt: ARPrompt) -> Tensor | None:
    """bool [P, 1, Lp, Lp], True where a query may look; None when nothing is padded (plain causal)."""
    if not prompt.padded:
        return None
    length = prompt.input_ids.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=prompt.input_ids.device)
    causal = square.tril() & prompt.attention_mask.bool()[:, None, None, :]
    return causal | square.tril().triu()  # padding looks at itself: a softmax over nothing is not a number


def _padding_mask(prompt: ARPrompt, group_size: int, length: int, like: Tensor) -> Tensor | None:
    """Additive [B, 1, 1, length] in the dtype of `like`, -inf on the padding; None when nothing is padded."""
    if not prompt.padded:
        return None
    visible = F.pad(prompt.attention_mask.bool(), (0, length - prompt.attention_mask.shape[1]), value=True)
    mask = torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, -torch.inf)
    return mask.repeat_interleave(group_size, dim=0)[:, None, None]


def _rotary_table(text_model: GlmImageTextModel, like: Tensor, prompt: ARPrompt, group_size: int) -> Rotary:
    """Tables of all decode steps, [B, T - 1, 1, rotary_dim] ([1, ...] for one prompt). The last token is never read."""
    table = Rotary.of(text_model, like, prompt.decode_position_ids[:, :, :-1])
    rows = 1 if len(prompt) == 1 else group_size
    return Rotary(*(part.repeat_interleave(rows, dim=0) for part in (table.cos, table.signed_sin)))


def _norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """`norm` itself, or for the stock class the same in two kernels instead of seven, rounded before the weight too."""
    if type(norm) is not GlmImageRMSNorm:
        return norm
    size, eps = list(cast(Tensor, norm.weight).shape), cast(float, norm.variance_epsilon)
    # the weight is looked up at each call: in shards it is another until the layer is gathered
    return lambda hidden: cast(Tensor, norm.weight) * torch.rms_norm(hidden, size, None, eps).to(hidden.dtype)
