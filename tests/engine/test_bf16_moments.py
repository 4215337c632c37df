"""Moments in bf16: rounding that is right on average, steps by hand, and bit for bit over a resume."""

from __future__ import annotations

import math

import pytest
import torch

from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.bf16_moments import BF16MomentsAdamW, stochastically_rounded
from glm_training.engine.parts import Part
from glm_training.utils.distributed import World
from tests.runs import trainer_of, weights_of

BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.999, 1e-8, 0.125, 0.25
COUNT = 1 << 14


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -(1.0 + 2**-9), 3.14159265, -1e-20, 2.0**-130, 0.0])
def test_rounding_gives_a_neighbour_and_is_right_on_average(value):
    """A share s of the way from the lower neighbour gives the upper one with chance s: mean v, deviation of the mean
    gap sqrt(s (1 - s) / n)."""
    exact = torch.tensor(value, dtype=torch.float32)
    bits = exact.view(torch.int32)
    lower = (bits & -65536).view(torch.float32).item()
    upper = ((bits & -65536) + 65536).view(torch.float32).item()
    rounded = stochastically_rounded(exact.expand(COUNT), generator())
    assert rounded.dtype == torch.bfloat16 and set(rounded.tolist()) <= {lower, upper}
    share = (exact.item() - lower) / (upper - lower)
    deviation = abs(upper - lower) * math.sqrt(share * (1 - share) / COUNT)
    assert abs(rounded.double().mean().item() - exact.item()) <= 5 * deviation


def test_what_bf16_has_stays():
    values = torch.linspace(-3, 3, 4096).bfloat16().float()
    assert torch.equal(stochastically_rounded(values, generator()).float(), values)


def optimizer_of(parameter: torch.nn.Parameter, decay: float = 0.0) -> BF16MomentsAdamW:
    return BF16MomentsAdamW([parameter], RATE, (BETA1, BETA2), EPS, decay)


def test_the_first_step_is_adamws():
    """It is computed before anything is rounded: p (1 - lr decay) - lr g / (|g| + eps)."""
    start, gradient = torch.linspace(-2, 3, 64), torch.linspace(-1, 1, 64)
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = gradient.clone()
    optimizer = optimizer_of(parameter, DECAY)
    optimizer.step()
    wide = gradient.double()
    expected = start.double() * (1 - RATE * DECAY) - RATE * wide / (wide.abs() + EPS)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert sum(each.numel() * each.element_size() for each in (state["exp_avg"], state["exp_avg_sq"])) == 4 * 64


def test_the_second_moment_falls_as_it_must_where_gradients_end():
    """v_n = (1 - beta2) g^2 beta2^(n-1) on average; rounded to the nearest it would stay at v_1."""
    parameter = torch.nn.Parameter(torch.zeros(COUNT))
    optimizer = optimizer_of(parameter)
    parameter.grad = torch.ones(COUNT)
    optimizer.step()
    first = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
    parameter.grad = torch.zeros(COUNT)
    for _ in range(200):
        optimizer.step()
    expected = (1 - BETA2) * BETA2**200
    found = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
    # each of 201 roundings moves a value by less than a gap of 2^-7 of it
    assert abs(found / expected - 1) < 5 * 2**-7 * math.sqrt(201 / COUNT) and found < 0.85 * first


def test_steps_are_near_those_of_torchs_adamw():
    torch_s, ours = (torch.nn.Parameter(torch.linspace(-1, 2, COUNT)) for _ in range(2))
    reference = torch.optim.AdamW([torch_s], RATE, (BETA1, BETA2), EPS, DECAY)
    narrow = optimizer_of(ours, DECAY)
    for step in range(20):
        gradient = torch.linspace(-4, 4, COUNT).mul(1 + step).cos() + 0.5
        for parameter, optimizer in ((torch_s, reference), (ours, narrow)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (torch_s.detach() - torch.linspace(-1, 2, COUNT)).norm()
    assert (ours - torch_s).norm() < 0.01 * moved
    assert not torch.equal(ours, torch_s)


def test_the_same_step_draws_the_same_and_others_do_not():
    """Processes that hold the same weights go on holding them; no global generator is asked. With betas of 0 the
    moments are the same numbers at each step, but for the rounding."""
    parameters = [torch.nn.Parameter(torch.linspace(-1, 2, 512)) for _ in range(2)]
    optimizers = [BF16MomentsAdamW([parameter], RATE, (0.0, 0.0), EPS) for parameter in parameters]
    before, seen = torch.get_rng_state(), []
    for _ in range(2):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = torch.linspace(-1, 1, 512)
            optimizer.step()
        left, right = (optimizer.state[parameter] for parameter, optimizer in zip(parameters, optimizers, strict=True))
        assert torch.equal(left["exp_avg"], right["exp_avg"]) and torch.equal(left["exp_avg_sq"], right["exp_avg_sq"])
        seen.append(left["exp_avg"].clone())
    assert torch.equal(*parameters) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*seen)


def part_of(component: torch.nn.Module) -> Part:
    settings = ResolvedOptimizer(
        "adamw", RATE, BETA1, BETA2, EPS, DECAY, 0.0, "constant", 0, 0.0, moments_dtype="bfloat16"
    )
    return Part("ar", component, dict(component.named_parameters()), settings, World(), total_steps=10)


def test_a_part_takes_it_and_leaves_norms_and_biases_out_of_the_decay():
    part = part_of(torch.nn.Linear(3, 2))
    assert isinstance(part.optimizer, BF16MomentsAdamW)
    assert [group["weight_decay"] for group in part.optimizer.param_groups] == [DECAY, 0.0]


def test_a_resume_goes_on_bit_for_bit(tmp_path):
    keys = ["training.optimizer=adamw", "training.adam_beta1=0.9", "optimizer.moments_dtype=bfloat16"]
    keys += ["training.use_reward=false", "model.component=dit", "training.learning_rate=0.001"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for folder in (whole, halved):
        folder.mkdir()
    straight = trainer_of(whole, *keys, "training.max_steps=4")
    straight.train()
    trainer_of(halved, *keys, "training.max_steps=2").train()
    resumed = trainer_of(halved, *keys, "training.max_steps=4", "checkpoint.resume_from=latest")
    resumed.train()
    expected, found = weights_of(straight)["dit"], weights_of(resumed)["dit"]
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name, parameter in resumed.parts["dit"].parameters.items():
        kept, theirs = (
            trainer.parts["dit"].optimizer.state[trainer.parts["dit"].parameters[name]]
            for trainer in (resumed, straight)
        )
        assert kept["exp_avg_sq"].dtype == torch.bfloat16 and torch.equal(kept["exp_avg_sq"], theirs["exp_avg_sq"])
        assert parameter.dtype == torch.float32
