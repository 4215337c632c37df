"""Prior tokens dropped by a multiplication against the stock transformer's write through a boolean index."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from glm_training.models.glm_image.attention import install_key_mask
from glm_training.models.glm_image.conditioning import PriorEmbedding, install_prior_drop, prior_arguments
from glm_training.models.glm_image.latents import upsample_tokens
from glm_training.models.glm_image.tiny import build_tiny

GRID = (2, 3)


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    return build_tiny().transformer


def arguments(rows: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 12, generator=make),
        "encoder_hidden_states": torch.randn(rows, 2, 32, generator=make),
        "timestep": torch.tensor([900, 20, 300])[:rows],
        "target_size": torch.tensor([[64, 96]]).expand(rows, -1),
        "crop_coords": torch.zeros(rows, 2, dtype=torch.long),
        "return_dict": False,
    }


def velocity_and_gradients(transformer: nn.Module, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    transformer.zero_grad()
    (velocity,) = transformer(**given)
    velocity.square().sum().backward()
    return velocity.detach(), {name: param.grad for name, param in transformer.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("drop", [(False, False, False), (True, False, True), (True, True, True)])
def test_values_and_gradients_are_those_of_the_stock_transformer_bit_for_bit(stock, drop, checkpointing):
    theirs, ours = copy.deepcopy(stock), copy.deepcopy(stock)
    install_prior_drop(ours)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    if checkpointing:
        theirs.enable_gradient_checkpointing()
        ours.enable_gradient_checkpointing()
    tokens = torch.randint(0, 64, (3, 6), generator=torch.Generator().manual_seed(2))
    dropped = torch.tensor(drop)
    ids = upsample_tokens(tokens, GRID)
    mask = dropped[:, None].expand_as(ids)
    expected = velocity_and_gradients(theirs, arguments(3) | {"prior_token_id": ids, "prior_token_drop": mask})
    found = velocity_and_gradients(ours, arguments(3) | prior_arguments(tokens, GRID, dropped))
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
    # the stock way of asking gives the stock answer: its pipelines draw with our transformer
    again = velocity_and_gradients(ours, arguments(3) | {"prior_token_id": ids, "prior_token_drop": mask})
    assert torch.equal(again[0], expected[0])


def test_no_number_is_needed_to_drop(stock):
    """Under fake tensors the stock write has no shape; nor has a graph, and a device would be waited for."""
    transformer = copy.deepcopy(stock)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = arguments(3)
        tokens, dropped = torch.zeros(3, 6, dtype=torch.long), torch.ones(3, dtype=torch.bool)
        ids = upsample_tokens(tokens, GRID)
        asked = {"prior_token_id": ids, "prior_token_drop": dropped[:, None].expand_as(ids)}
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            transformer(**given, **asked)
        install_prior_drop(transformer)
        (velocity,) = transformer(**given, **prior_arguments(tokens, GRID, dropped))
        assert velocity.shape == (3, 4, 8, 12)


def test_the_weight_stays_the_parameter_that_it_was(stock):
    transformer = copy.deepcopy(stock).requires_grad_(False)
    weight = transformer.prior_token_embedding.weight
    install_prior_drop(transformer)
    install_prior_drop(transformer)
    install_key_mask(transformer)
    assert isinstance(transformer.prior_token_embedding, PriorEmbedding)
    assert transformer.prior_token_embedding.weight is weight and not weight.requires_grad
