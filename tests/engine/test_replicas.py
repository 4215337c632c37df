"""DDP's layout of gradients, on a group of one process: what depends on it are sums among three or more
(benchmarks/results/resumes.json)."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from glm_training.engine.parts import replicated
from tests.warm import free_port


@pytest.fixture
def group():
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Backwards(nn.Module):
    """Uses its layers in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.layers[1].requires_grad_(False)

    def forward(self, x):
        for layer in self.layers[::-1]:
            x = layer(x)
        return x


@pytest.mark.parametrize("find_unused", [False, True])
def test_gradients_lie_at_the_first_step_where_they_lie_at_all(group, find_unused):
    component = Backwards()
    policy = replicated(component, find_unused_parameters=find_unused)
    layouts = []

    def keep(state, bucket):
        layouts[-1].append(
            [next(i for i, p in enumerate(component.parameters()) if p is each) for each in bucket.parameters()]
        )
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    policy.register_comm_hook(None, keep)
    x = torch.ones(2, 8)
    for _ in range(3):
        layouts.append([])
        policy(x).sum().backward()
    assert sorted(sum(layouts[0], [])) == [0, 1, 4, 5, 6, 7] and layouts[0] == layouts[1] == layouts[2]
    alone = [p.grad for p in component.parameters() if p.requires_grad]
    expected = torch.autograd.grad(3 * component(x).sum(), [p for p in component.parameters() if p.requires_grad])
    for found, wanted in zip(alone, expected, strict=True):
        torch.testing.assert_close(found, wanted)
