"""What the supported versions of the libraries call differently; the lowest ones are in pyproject.toml.

Each function goes when its older name is below them.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel) -> None:
    """The layers of the model are computed again in the backward pass, in training mode."""
    newer = hasattr(model, "activation_checkpointing_enable")  # from transformers 5.23 on
    enable: Any = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument of `model`'s forward that hands it a key/value cache."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # 5.23 renamed it
    return {name: cache, "use_cache": True}


def without_buffers_sent() -> dict[str, Any]:
    """The option of DistributedDataParallel that keeps buffers from being sent at each forward pass."""
    named = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False}  # torch 2.14


@cache
def autocast_options() -> dict[str, Any]:
    """Options of every autocast that passes without gradient share with passes that have one.

    torch 2.8 keeps the cast of a weight that a pass under no_grad made, and hands it to the next pass: no gradient
    reaches the weight, and nothing tells. There casts are not kept.
    """
    weight = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            nn.functional.linear(weight, weight)
        reached = nn.functional.linear(weight.detach(), weight).requires_grad
    return {} if reached else {"cache_enabled": False}
