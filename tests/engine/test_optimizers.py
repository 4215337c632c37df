"""The schedule of every step, what weight decay acts on, and what a checkpoint keeps of an optimizer, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.optimizers import decays
from glm_training.engine.parts import Part
from glm_training.models.snapshot import ParameterSnapshot
from glm_training.utils.distributed import World

RATE, DECAY = 0.5, 0.25
SETTINGS = ResolvedOptimizer(
    name="adamw",
    learning_rate=RATE,
    beta1=0.75,
    beta2=0.5,
    epsilon=2.0**-10,
    weight_decay=DECAY,
    max_grad_norm=0.0,
    scheduler="constant",
    warmup_steps=0,
    min_lr_ratio=0.0,
)
SGD = replace(SETTINGS, name="sgd")
EXACT = {"rtol": 0.0, "atol": 0.0}
FP32 = {"rtol": 8 * torch.finfo(torch.float32).eps, "atol": 0.0}


class Toy(torch.nn.Module):
    """A matrix, a bias, the scale of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.norm = torch.nn.RMSNorm(2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, -2.0]]))
            self.linear.bias.fill_(4.0)
            self.norm.weight.copy_(torch.tensor([8.0, 16.0]))


def part_of(settings: ResolvedOptimizer = SETTINGS, *, steps: int = 10, scaling: bool = False) -> Part:
    module = Toy()
    return Part(
        "ar", module, dict(module.named_parameters()), settings, World(), total_steps=steps, loss_scaling=scaling
    )


def move(part: Part, gradient: float, step: int = 0) -> None:
    """One optimizer step with the same gradient everywhere."""
    loss = sum(parameter.sum() for parameter in part.parameters.values()) * gradient
    part.backward(loss)
    part.step(step)


# -- learning rate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325, 0.1]),
        ("polynomial", [1 / 3, 2 / 3, 1, 0.1 + 0.9 * 0.75**3, 0.1 + 0.9 / 8, 0.1 + 0.9 / 64, 0.1]),
        # two half waves over four steps: each begins at all of it, halfway it has half, and the last step the least
        ("cosine_with_restarts", [1 / 3, 2 / 3, 1, 0.55, 1, 0.55, 0.1]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5)), 0.1]),
    ],
)
def test_the_rate_of_every_step(scheduler, expected):
    """Two steps of warmup, the full rate at the third, a tenth of it at the last of seven."""
    settings = replace(SETTINGS, scheduler=scheduler, warmup_steps=2, min_lr_ratio=0.1, learning_rate=3e-4, power=3.0)
    part = part_of(settings, steps=7)
    rates = [part.learning_rate(step) for step in range(7)]
    assert rates == pytest.approx([3e-4 * share for share in expected], rel=1e-12)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0, 1, [1.0]), (3, 2, [0.25, 0.5]), (1, 2, [0.5, 1.0])])
def test_short_runs_have_a_rate_at_every_step(scheduler, warmup, steps, expected):
    part = part_of(replace(SETTINGS, scheduler=scheduler, warmup_steps=warmup, learning_rate=1.0), steps=steps)
    assert [part.learning_rate(step) for step in range(steps)] == pytest.approx(expected)


def test_a_step_moves_by_the_rate_of_its_schedule():
    settings = replace(SGD, scheduler="linear", beta1=0.0, weight_decay=0.0, min_lr_ratio=0.5)
    part = part_of(settings, steps=3)
    for step in range(3):
        move(part, 1.0, step)
    assert part.component.linear.bias.item() == 4.0 - RATE * (1 + 0.75 + 0.5)


# -- updates in closed form --------------------------------------------------------------------------------------------


def test_sgd_decays_decoupled_from_its_momentum():
    """p <- p (1 - lr d) - lr m, m <- beta m + g: powers of two, so exact. Coupled decay would enter m."""
    part = part_of(SGD)
    weight, momentum = torch.tensor([[1.0, -2.0]]), 0.0
    for gradient in (1.0, -2.0, 0.5):
        move(part, gradient)
        momentum = 0.75 * momentum + gradient
        weight = weight * (1 - RATE * DECAY) - RATE * momentum
        torch.testing.assert_close(part.component.linear.weight, weight, **EXACT)


@pytest.mark.parametrize("settings", [SETTINGS, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("everything", [False, True])
def test_norms_and_biases_decay_only_where_asked(settings, everything):
    """Without gradient and with it: what a zero gradient leaves of a weight after one step is its decay."""
    part = part_of(replace(settings, decay_norms_and_biases=everything))
    move(part, 0.0)
    shrunk = 1 - RATE * DECAY
    vectors = shrunk if everything else 1.0
    torch.testing.assert_close(part.component.linear.weight, torch.tensor([[1.0, -2.0]]) * shrunk, **EXACT)
    torch.testing.assert_close(part.component.linear.bias, torch.tensor([4.0]) * vectors, **EXACT)
    torch.testing.assert_close(part.component.norm.weight, torch.tensor([8.0, 16.0]) * vectors, **EXACT)


def test_what_decays_is_told_by_name_and_dimension():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    decayed = {"to_q.weight": matrix, "to_q.lora_A.weight": matrix, "norm1.linear.weight": matrix}
    kept = {"norm.weight": vector, "to_q.bias": vector, "scale": vector, "attention.bias": matrix}
    assert all(decays(name, parameter, SETTINGS) for name, parameter in decayed.items())
    assert not any(decays(name, parameter, SETTINGS) for name, parameter in kept.items())


def test_a_step_left_out_by_loss_scaling_decays_nothing():
    for settings in (SETTINGS, SGD):
        part = part_of(settings, scaling=True)
        move(part, math.inf)
        torch.testing.assert_close(part.component.linear.weight, torch.tensor([[1.0, -2.0]]), **EXACT)


def test_a_parameter_without_gradient_does_not_decay():
    part = part_of(SGD)
    part.backward(part.component.norm.weight.sum())
    part.step(0)
    torch.testing.assert_close(part.component.linear.weight, torch.tensor([[1.0, -2.0]]), **EXACT)


# -- resuming ----------------------------------------------------------------------------------------------------------


def resumed(before: Part, settings: ResolvedOptimizer) -> Part:
    part = part_of(settings)
    part.load_state(before.state(with_optimizer=True))
    return part


def test_a_resumed_part_takes_hyperparameters_from_the_configuration_and_moments_from_the_checkpoint():
    """AdamW after one step of gradient 1, then resumed with everything changed, by hand."""
    before = part_of()
    move(before, 1.0)
    part = resumed(before, replace(SETTINGS, beta1=0.5, beta2=0.25, epsilon=1.0, weight_decay=0.5, learning_rate=0.25))
    weight = before.component.linear.weight.detach().double()
    move(part, 2.0)
    first, second = 0.5 * 0.25 + 0.5 * 2.0, 0.25 * 0.5 + 0.75 * 4.0  # moments of the first step: 0.25 and 0.5
    step = (first / (1 - 0.5**2)) / (math.sqrt(second / (1 - 0.25**2)) + 1.0)
    expected = weight * (1 - 0.25 * 0.5) - 0.25 * step
    torch.testing.assert_close(part.component.linear.weight.double(), expected, **FP32)


def test_a_resumed_sgd_part_takes_momentum_and_decay_from_the_configuration():
    before = part_of(SGD)
    move(before, 1.0)
    part = resumed(before, replace(SGD, beta1=0.5, weight_decay=0.5))
    weight = before.component.linear.weight.detach()
    move(part, 2.0)
    expected = weight * (1 - RATE * 0.5) - RATE * (0.5 * 1.0 + 2.0)
    torch.testing.assert_close(part.component.linear.weight, expected, **EXACT)


@pytest.mark.parametrize("everything", [False, True])
def test_moments_find_their_parameter_when_the_groups_change(everything):
    """The order over the groups is another one, and a checkpoint from before they were named has torch's numbers."""
    before = part_of(replace(SETTINGS, decay_norms_and_biases=not everything))
    for scale, parameter in enumerate(before.parameters.values(), start=1):
        parameter.grad = torch.full_like(parameter, float(scale))
    before.step(0)
    state = before.state(with_optimizer=True)
    old = torch.optim.AdamW(before.parameters.values())
    for parameter in before.parameters.values():
        old.state[parameter] = before.optimizer.state[parameter]
    for tree in (state["ar_optimizer"], old.state_dict()):
        part = part_of(replace(SETTINGS, decay_norms_and_biases=everything))
        part.load_state(state | {"ar_optimizer": tree})
        for scale, parameter in enumerate(part.parameters.values(), start=1):
            moment = part.optimizer.state[parameter]["exp_avg"]
            torch.testing.assert_close(moment, torch.full_like(parameter, 0.25 * scale), **EXACT)


def test_another_class_of_optimizer_is_refused_by_name():
    before = part_of()
    move(before, 1.0)
    with pytest.raises(CheckpointError, match="AdamW.*SGD"):
        resumed(before, SGD)


def test_loss_scaling_and_snapshots_that_the_checkpoint_lacks_begin_anew():
    """`resume.accept` of mixed_precision, or of a slow average that the run did not have."""
    before = part_of()
    move(before, 1.0)
    part = part_of(scaling=True)
    part.old, part.average = ParameterSnapshot(part.parameters), ParameterSnapshot(part.parameters)
    part.load_state(before.state(with_optimizer=True))
    assert part.scaler.get_scale() == 65536.0
    for snapshot in (part.old, part.average):
        for name, value in snapshot.state_dict().items():
            torch.testing.assert_close(value, before.parameters[name].detach(), **EXACT)
