"""Joint attention of the DiT with a boolean key mask and with reference keys that belong to one call.

Stock GLM-Image keeps reference keys and values in a mutable cache whose mode ("write", "read", "skip") is global, which
gradient checkpointing recomputes in the wrong mode; and its attention mask is an additive bias that does not mask. Here
the two kinds of cache are two kinds of object, handed to one call and never switched.

The carriers are plain classes on purpose: FSDP rebuilds and casts every dataclass, tuple and tensor it finds among the
arguments of a block. That would lose what a recorder records and round the rotary angles to bf16.

B rows, U different source images, S tokens of a source, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_glm_image import (
    GlmImageAttnProcessor,
    GlmImageLayerKVCache,
    GlmImageTransformer2DModel,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


class Rotary:
    """Rotary angles of the image tokens: cos and sin ``[patches, head_dim]`` fp32."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


class LayerRecorder:
    """Takes the keys and values ``[U, S, heads, head_dim]`` of one layer, once.

    Gradient checkpointing runs the layer again during backward; those tensors are of no use and must not be kept alive.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def record(self, key: Tensor, value: Tensor) -> None:
        if self.key is None:
            self.key, self.value = key, value


class LayerReference:
    """Keys and values ``[U, S, heads, head_dim]`` of one layer that row b of a call reads at entry ``rows[b]``."""

    def __init__(self, key: Tensor, value: Tensor, rows: Tensor | None) -> None:
        self._key = key
        self._value = value
        self._rows = rows

    def prepend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The reference keys and values in front of the row's own."""
        reference_key, reference_value = self._key, self._value
        if self._rows is not None:
            reference_key, reference_value = reference_key[self._rows], reference_value[self._rows]
        return (
            torch.cat([reference_key.to(key.dtype), key], dim=1),
            torch.cat([reference_value.to(value.dtype), value], dim=1),
        )


class Recorder:
    """One :class:`LayerRecorder` per layer; what a transformer call takes as `kv_caches` to be recorded."""

    def __init__(self, layers: int) -> None:
        self._layers = [LayerRecorder() for _ in range(layers)]

    def __getitem__(self, layer: int) -> LayerRecorder:
        return self._layers[layer]


class Reference:
    """Recorded keys and values of all layers; what a transformer call takes as `kv_caches` to read them."""

    def __init__(self, recorder: Recorder, layers: int) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(layers):
            key, value = recorder[layer].key, recorder[layer].value
            if key is None or value is None:
                raise ValueError(f"layer {layer} recorded no keys: the transformer was not run with this recorder")
            self._layers.append((key, value))
        self._rows: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Reference tokens S in front of every row."""
        return self._layers[0][0].shape[1]

    def for_rows(self, rows: Tensor) -> Reference:
        """The same keys, read at entry ``rows[b]`` by row b."""
        view = object.__new__(Reference)
        view._layers = self._layers
        view._rows = rows
        return view

    def __getitem__(self, layer: int) -> LayerReference:
        key, value = self._layers[layer]
        return LayerReference(key, value, self._rows)


class KeyMaskAttnProcessor(GlmImageAttnProcessor):
    """The stock attention, plus: `attention_mask` ``[B, K]`` bool, True for keys that may be attended to.

    K counts reference, text and image keys in this order. Without a mask the numbers are bit for bit the stock ones;
    with a stock cache (the stock pipeline always passes one) the stock code runs.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | tuple[Tensor, Tensor] | None = None,
        kv_cache: LayerRecorder | LayerReference | GlmImageLayerKVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        rotary = image_rotary_emb
        angles = (rotary.cos, rotary.sin) if isinstance(rotary, Rotary) else rotary
        if isinstance(kv_cache, GlmImageLayerKVCache):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=angles, kv_cache=kv_cache
            )
        text_tokens = encoder_hidden_states.shape[1]
        query, key, value = self._project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        if angles is not None:
            query, key = (_rotate_image(states, angles, text_tokens) for states in (query, key))
        if isinstance(kv_cache, LayerRecorder):
            kv_cache.record(key, value)
        elif isinstance(kv_cache, LayerReference):
            key, value = kv_cache.prepend(key, value)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        attended = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        joint = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).to(query.dtype)))
        return joint[:, text_tokens:], joint[:, :text_tokens]

    @staticmethod
    def _project(attn: Attention, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            projection(joint).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query).to(joint.dtype)
        if attn.norm_k is not None:
            key = attn.norm_k(key).to(joint.dtype)
        return query, key, value


def _rotate_image(states: Tensor, angles: tuple[Tensor, Tensor], text_tokens: int) -> Tensor:
    """Rotary embedding of the image tokens of ``[B, tokens, heads, head_dim]``; text tokens have no position."""
    cos, sin = (angle.to(states.device)[None, :, None, :] for angle in angles)
    image = states[:, text_tokens:]
    first, second = image.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = (image.float() * cos + turned.float() * sin).to(states.dtype)
    return torch.cat([states[:, :text_tokens], rotated], dim=1) if text_tokens else rotated


@contextmanager
def keys_leave_by_the_side(transformer: GlmImageTransformer2DModel) -> Iterator[None]:
    """Run a recording pass inside. Under FSDP its blocks are recomputed in backward, whatever checkpointing is set to.

    FSDP gathers a block's weights again when the gradient of the block's *outputs* arrives; recorded keys are none of
    them, so their gradient would meet freed weights. A recomputed block gathers its weights itself.
    """
    sharded = any(isinstance(block, FSDPModule) for block in transformer.transformer_blocks)
    if not sharded or not torch.is_grad_enabled() or transformer.is_gradient_checkpointing:
        yield
        return
    transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def install_key_mask(transformer: GlmImageTransformer2DModel) -> None:
    """Give every block its :class:`KeyMaskAttnProcessor`, keeping an attention backend that was set before."""
    for module in transformer.modules():
        if isinstance(module, Attention) and type(module.processor) is GlmImageAttnProcessor:
            processor = KeyMaskAttnProcessor()
            processor._attention_backend = module.processor._attention_backend
            processor._parallel_config = module.processor._parallel_config
            module.set_processor(processor)
