"""Frozen linear layers in 8 and 4 bits: against bitsandbytes' own dequantisation, in bytes, and in what they leave."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from glm_training.config import Config
from glm_training.engine.families import build_family
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.models.lora import add_lora, merged
from glm_training.models.quantization import Int8Linear, bytes_held, quantise_layers, quantised_layers
from glm_training.utils.distributed import World
from tests.runs import config_of

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes not installed")

KINDS = ["int8", "nf4"]
CPU = torch.device("cpu")
NF4_GAP = 1 - 0.6961928009986877
"""Between the two values of NF4 that lie farthest apart, of [-1, 1] (QLoRA, appendix E)."""


class Block(nn.Module):
    def __init__(self, rows: int, columns: int, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rows, bias=bias)
        self.norm = nn.LayerNorm(rows)


class Net(nn.Module):
    """One block, and a head outside of it."""

    def __init__(self, rows: int = 96, columns: int = 256, bias: bool = True) -> None:
        super().__init__()
        self.block = Block(rows, columns, bias)
        self.head = nn.Linear(rows, 2)


def quantised(kind: str, dtype: torch.dtype = torch.float32, **shape) -> tuple[nn.Linear, nn.Linear]:
    """A layer in full, and the one that stands in its place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(**shape).to(dtype)
    full = net.block.inner
    assert quantise_layers(net, [net.block], kind, dtype, CPU) == ["block.inner"]
    return full, net.block.inner


def dequantised(layer: nn.Linear) -> torch.Tensor:
    from bitsandbytes import functional

    if isinstance(layer, Int8Linear):
        return functional.int8_vectorwise_dequant(layer.weight.data, layer.absmax)
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_product_with_what_bitsandbytes_dequantises(kind, dtype):
    full, layer = quantised(kind, dtype)
    inputs = torch.linspace(-2, 2, 3 * 5 * 256).view(3, 5, 256).sin().to(dtype).requires_grad_()
    weight = dequantised(layer).to(dtype)
    output = layer(inputs)
    torch.testing.assert_close(output, nn.functional.linear(inputs, weight, full.bias), rtol=0, atol=0)
    gradient = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
    (found,) = torch.autograd.grad(output, inputs, gradient)
    torch.testing.assert_close(found, gradient @ weight, rtol=0, atol=0)


def test_eight_bits_are_the_nearest_of_255_levels_of_each_row():
    full, layer = quantised("int8")
    largest = full.weight.detach().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(layer.absmax[:, None], largest, rtol=2**-11, atol=0)  # read through fp16
    half_a_level = largest / 127 / 2
    assert ((dequantised(layer) - full.weight).abs() <= half_a_level + largest * 2**-11).all()


def test_four_bits_are_near_in_each_block_of_64():
    """Within half the widest gap of the table; the scale of a block has 8 bits itself."""
    full, layer = quantised("nf4")
    blocks = full.weight.detach().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    off = (dequantised(layer).view(-1, 64) - blocks).abs()
    assert (off <= largest * (NF4_GAP / 2) + 0.01 * largest.max()).all()
    assert off.norm() / blocks.norm() < 0.11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_drawing_and_replaying_compute_the_same_bits(kind, dtype):
    """A rollout runs in evaluation mode without gradients, its replay in training mode with them."""
    _, layer = quantised(kind, dtype)
    inputs = torch.linspace(-3, 3, 4 * 256).view(4, 256).cos().to(dtype)
    with torch.no_grad():
        drawn = layer.eval()(inputs)
    assert torch.equal(layer.train()(inputs.clone().requires_grad_()), drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_products_are_in_its_type_and_the_output_in_the_inputs(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    quantise_layers(net, [net.block], kind, torch.bfloat16, CPU)
    layer, inputs = net.block.inner, torch.linspace(-3, 3, 4 * 256).view(4, 256)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    expected = nn.functional.linear(inputs.bfloat16(), dequantised(layer).bfloat16(), layer.bias.bfloat16())
    assert output.dtype == torch.float32 and torch.equal(output, expected.float())


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.26), ("int8", 0.502)])
def test_bytes_of_a_layer_of_the_real_width(kind, most):
    _, layer = quantised(kind, torch.bfloat16, rows=1024, columns=4096, bias=False)
    held, full = bytes_held(nn.Sequential(layer))
    assert full == 2 * 1024 * 4096
    assert 0.9 * most * full < held <= most * full


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_outside_of_the_blocks_stays(kind):
    net = Net()
    head, norm = net.head, net.block.norm
    quantise_layers(net, [net.block], kind, torch.float32, CPU)
    assert net.head is head and net.block.norm is norm
    with pytest.raises(ValueError, match="no linear layers"):
        quantise_layers(nn.Sequential(nn.ReLU()), [], kind, torch.float32, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_not_merged_into_few_bits(kind):
    transformer = build_tiny().transformer
    quantise_layers(transformer, transformer.transformer_blocks, kind, torch.float32, CPU)
    add_lora(transformer, ["to_q"], rank=2, alpha=2)
    with pytest.raises(ValueError, match="few bits"), merged(transformer):
        pass


def built(tmp_path, *keys: str):
    config: Config = config_of(tmp_path, "lora.enabled=true", "lora.rank=2", *keys)
    return config, build_family(config, World())


@pytest.mark.parametrize("kind", KINDS)
def test_of_glm_image_the_blocks_of_what_is_trained_have_few_bits(tmp_path, kind):
    _, family = built(tmp_path, f"model.quantization={kind}", "model.component=ar")
    names = set(quantised_layers(family.module("ar")))
    text = {name for name in names if name.startswith("model.language_model.layers.")}
    assert names == text and len(names) == 6 * len(family.module("ar").model.language_model.layers)
    assert not quantised_layers(family.module("dit"))
    _, family = built(tmp_path, f"model.quantization={kind}", "model.component=dit")
    assert not quantised_layers(family.module("ar"))
    held, full = bytes_held(family.module("dit"))
    assert held <= (0.3 if kind == "nf4" else 0.53) * full


def test_only_adapters_are_trained_and_they_are_pefts_for_four_bits(tmp_path):
    from peft.tuners.lora.bnb import Linear4bit

    config, family = built(tmp_path, "model.quantization=nf4")
    for part in config.parts():
        wrapped = [layer for layer in family.module(part).modules() if isinstance(layer, LoraLayer)]
        assert wrapped and all(isinstance(layer, Linear4bit) for layer in wrapped)
        trained = family.trainable(part)
        assert trained and all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
