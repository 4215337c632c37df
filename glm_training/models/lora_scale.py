"""An adapter at part of its strength: one UNet as two denoisers that differ by how much of the adapter they use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from glm_training.models.lora import ADAPTER, adapters_disabled


@contextmanager
def adapters_scaled(module: nn.Module, scale: float) -> Iterator[None]:
    """Inside, the module computes W + `scale` (alpha / rank) B A; at 0 what it did without adapters.

    With gradient checkpointing leave it after the backward pass only: blocks are recomputed there. Nested scales
    multiply. Raises ValueError without adapters, or for a scale that is negative or not finite.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number >= 0, got {scale}")
    layers = [child for child in module.modules() if isinstance(child, LoraLayer)]
    if not layers:
        raise ValueError("the module carries no LoRA adapters")
    if scale == 0:  # not computed at all
        with adapters_disabled(module):
            yield
        return
    before = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, strength in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = strength * scale
        yield
    finally:
        for layer, strength in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = strength
