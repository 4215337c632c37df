"""VGT's flow head against its formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from glm_training.models.vgt.flow_head import FlowHead, HeadBlock, time_features
from tests.models.vgt.generators import random_weights


def head(width: int = 8, depth: int = 4) -> FlowHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlowHead(3, 5, width, depth)


def test_time_features_by_hand() -> None:
    features = time_features(torch.tensor([[0.0, 1.0], [0.25, 0.5]]))
    assert features.shape == (2, 2, 256)
    assert features[0, 0].tolist() == [1.0] * 128 + [0.0] * 128
    for row, time in ((features[0, 1], 1.0), (features[1, 0], 0.25)):
        for place in (0, 1, 64, 127):
            angle = time * 10_000 ** (-place / 128)
            assert math.isclose(row[place], math.cos(angle), abs_tol=1e-6)
            assert math.isclose(row[128 + place], math.sin(angle), abs_tol=1e-6)


def test_the_first_velocity_is_zero_and_the_layers_start_as_published() -> None:
    made = head(width=256, depth=2)
    velocity, features = made(torch.randn(2, 3, 3), torch.rand(2, 3), torch.randn(2, 3, 5))
    assert velocity.shape == (2, 3, 3) and velocity.dtype == torch.float32 and velocity.abs().max() == 0
    assert features.shape == (2, 3, 256)
    zero = {"out", "modulation", "blocks.0.modulation", "blocks.1.modulation"}
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear):
            assert layer.bias.abs().max() == 0
            assert (layer.weight.abs().max() == 0) == (name in zero), name
    assert 0.019 < made.time_mlp[0].weight.std() < 0.021
    # Xavier: uniform in +- sqrt(6 / (in + out))
    bound = math.sqrt(6 / 512)
    weight = made.blocks[1].mlp[0].weight
    assert 0.99 * bound < weight.abs().max() <= bound


def test_a_block_by_its_formula() -> None:
    block = random_weights(HeadBlock(4))
    hidden, embedding = torch.randn(2, 4), torch.randn(2, 4)
    shift, scale, gate = F.linear(embedding, block.modulation.weight, block.modulation.bias).split(4, dim=1)
    centred = hidden - hidden.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * block.norm.weight + block.norm.bias
    first, _, last = block.mlp
    inner = F.linear(normed * (1 + scale) + shift, first.weight, first.bias)
    inner = F.linear(inner * torch.sigmoid(inner), last.weight, last.bias)
    torch.testing.assert_close(block(hidden, embedding), hidden + gate * inner, rtol=1e-4, atol=1e-5)


def test_time_and_condition_reach_the_velocity_and_the_middle_is_half_way() -> None:
    made = random_weights(head())
    noisy, times, condition = torch.randn(1, 1, 3), torch.tensor([[0.3]]), torch.randn(1, 1, 5)
    velocity, features = made(noisy, times, condition)
    assert not torch.allclose(made(noisy, times + 0.4, condition)[0], velocity)
    assert not torch.allclose(made(noisy, times, condition + 1)[0], velocity)
    with torch.no_grad():
        made.blocks[2].mlp[2].bias += 1  # the third of four
    moved, same = made(noisy, times, condition)
    assert torch.equal(same, features) and not torch.allclose(moved, velocity)
    with torch.no_grad():
        made.blocks[1].mlp[2].bias += 1
    assert not torch.allclose(made(noisy, times, condition)[1], features)


def test_tokens_do_not_meet() -> None:
    made = random_weights(head())
    noisy, times, condition = torch.randn(2, 3, 3, requires_grad=True), torch.rand(2, 3), torch.randn(2, 3, 5)
    velocity, _ = made(noisy, times, condition)
    (slope,) = torch.autograd.grad(velocity[1, 2].sum(), noisy)
    assert slope[1, 2].abs().min() > 0
    slope[1, 2] = 0
    assert slope.abs().max() == 0
