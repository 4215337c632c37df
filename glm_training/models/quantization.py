"""The frozen linear layers of a network that trains adapters, in 8 or 4 bits, by bitsandbytes.

nf4   4 bits to the quantiles of a normal distribution, a scale for each 64 weights, those scales in 8 bits themselves
      (QLoRA, arXiv:2305.14314): 4.13 bits a weight. bitsandbytes' own layer.
int8  8 bits, a scale for each output: W ~ codes absmax / 127. The weights alone, as bitsandbytes rounds them
      (arXiv:2208.07339). Its own layer of 8 bits rounds the activations too, on a CPU in evaluation mode only: what
      draws a rollout would compute otherwise than what replays it.

Weights W [out, in], inputs x [..., in].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["int8", "nf4"]

PACKAGE = "bitsandbytes"


def is_available() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


class Int8Linear(nn.Linear):
    """x -> x W^T + b with W = codes * absmax[:, None] / 127: the codes, int8 [out, in], are `weight`; absmax is fp32
    [out].

    Computes in `compute_dtype`, and gives the dtype that it was given. W is made anew in each pass, backward included:
    it is never kept.
    """

    absmax: Tensor

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        codes, absmax, _ = int8_vectorwise_quant(layer.weight.detach().to(device, torch.float16))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.bias = layer.bias
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as in nn.Linear)
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        output: Tensor = _Int8Product.apply(input.to(dtype), self.weight, self.absmax, bias)
        return output.to(input.dtype)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(codes, absmax)
        return nn.functional.linear(x, _dequantised(codes, absmax, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        codes, absmax = ctx.saved_tensors
        return gradient @ _dequantised(codes, absmax, gradient.dtype), None, None, None


def _dequantised(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: Tensor = int8_vectorwise_dequant(codes, absmax)
    return weight.to(dtype)


def _nf4_layer(layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    fresh: Any = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta"
    )
    weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=fresh)
    fresh.weight = weight.to(device)  # quantised on the way there
    fresh.bias = layer.bias
    # else a CPU with AVX512-BF16 packs the weights anew where there are no gradients, and a replay trips over them
    fresh.support_avx512bf16_for_cpu = False
    return fresh  # type: ignore[no-any-return]


def quantise_layers(
    module: nn.Module, blocks: Iterable[nn.Module], kind: Kind, compute_dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Puts every linear layer inside `blocks`, which are submodules of `module`, into few bits on `device`, one after
    the other: where the network waits on the CPU, the device never holds it in full. What is outside of them stays:
    embeddings, heads, convolutions, norms and biases.

    `compute_dtype` is what products are computed in. Returns the names of the layers. ValueError where there is none.
    """
    make = Int8Linear if kind == "int8" else _nf4_layer
    inside = {id(child) for block in blocks for child in block.modules()}
    names = [name for name, child in module.named_modules() if id(child) in inside and type(child) is nn.Linear]
    for name in names:
        layer: Any = module.get_submodule(name)
        module.set_submodule(name, make(layer, compute_dtype, device))
    if not names:
        raise ValueError(f"{type(module).__name__} has no linear layers in its blocks")
    if kind == "nf4":
        module.is_loaded_in_4bit = True  # type: ignore[assignment]  # by which PEFT knows its layers for them
    return names


def quantised_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers of `module` that `quantise_layers` made, by name."""
    layers = ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))
    return {name: layer for name, layer in layers if not layer.weight.is_floating_point()}


def bytes_held(module: nn.Module) -> tuple[int, int]:
    """What the weights of the quantised layers take, scales and tables included, and what they would in bf16."""
    held: dict[int, int] = {}
    layers = quantised_layers(module).values()
    for tensor in (tensor for layer in layers for tensor in _kept(layer)):
        held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(held.values()), sum(2 * layer.in_features * layer.out_features for layer in layers)


def _kept(layer: nn.Linear) -> list[Tensor]:
    if isinstance(layer, Int8Linear):
        return [layer.weight, layer.absmax]
    weight: Any = layer.weight
    state = weight.quant_state
    return [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
