"""The AR half under FSDP2 (one process, parameters as DTensors): prompts, rollout, replay and gradients unchanged."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import build_tiny

PROMPTS = ["a red circle", 'a sign that says "hello" next to a blue square']


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def looks(component):
    """What looks at pictures, which no run trains."""
    return [component.model.model.visual, component.model.model.vqmodel]


def shard(component):
    whole = {parameter for module in looks(component) for parameter in module.parameters()}
    for module in list(component.modules()):
        if type(module).__name__ in component.sharding_units:
            fully_shard(module)
    return fully_shard(component, ignored_params=whole)


def all_sharded(component):
    whole = {id(parameter) for module in looks(component) for parameter in module.parameters()}
    return all(isinstance(parameter, DTensor) for parameter in component.parameters() if id(parameter) not in whole)


def test_pictures_are_looked_at_without_the_other_processes(process_group, monkeypatch):
    """Of an uneven number of them a process has one more than the others, which would not come to gather anything."""
    pipeline = build_tiny()
    component = shard(ARComponent(pipeline.vision_language_encoder, pipeline.processor))
    gathers = []
    monkeypatch.setattr(FSDPModule, "unshard", lambda self, **options: gathers.append(self))
    tokens = component.tokenize_images(torch.rand(1, 3, 64, 64), (4, 4))
    assert component.code_vectors(tokens).shape[:2] == (1, 16) and not gathers


def test_a_sharded_component_does_what_the_whole_one_does(process_group):
    pipeline = build_tiny()
    whole = ARComponent(pipeline.vision_language_encoder, pipeline.processor)
    sharded = shard(copy.deepcopy(whole))
    sources = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        prompt = sharded.encode_prompts(PROMPTS, 64, 96, sources)
        assert torch.equal(prompt.input_ids, whole.encode_prompts(PROMPTS, 64, 96, sources).input_ids)
        uniforms = torch.rand(4, prompt.T, generator=torch.Generator().manual_seed(step))
        rollout = sharded.rollout(prompt, 2, uniforms, temperature=0.9, top_p=0.75)
        if step == 0:
            assert all_sharded(sharded)
        expected = whole.rollout(prompt, 2, uniforms, temperature=0.9, top_p=0.75)
        assert torch.equal(rollout.tokens, expected.tokens)
        gradients = []
        for component in (sharded, whole):
            component.zero_grad()
            scores = component(rollout.prompt, rollout.tokens, temperature=0.9, support=rollout.support)
            torch.testing.assert_close(scores.detach(), rollout.log_probs, atol=1e-5, rtol=0)
            scores.sum().backward()
            gradients.append(component.model.model.language_model.layers[1].mlp.down_proj.weight.grad)
        torch.testing.assert_close(gradients[0].full_tensor(), gradients[1])
