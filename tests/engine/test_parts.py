"""One half under training, on two toy layers: every optimizer step against numbers worked out by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.errors import NonFiniteError, TrainingError
from glm_training.engine.parts import MAX_SKIPPED, Part, WeightAverage, as_shown
from glm_training.models.snapshot import ParameterSnapshot
from glm_training.utils.distributed import World

SGD = ResolvedOptimizer(
    name="sgd",
    learning_rate=0.1,
    beta1=0.0,
    beta2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    max_grad_norm=0.0,
    scheduler="constant",
    warmup_steps=0,
    min_lr_ratio=0.0,
)


class Toy(nn.Module):
    """Two matrices, so that a norm over all of them differs from one over each; doubles, so that bounds are tight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        self.second = nn.Parameter(torch.tensor([[-3.0]], dtype=torch.float64))


def part_of(
    settings: ResolvedOptimizer = SGD,
    *,
    total_steps: int = 10,
    loss_scaling: bool = False,
    rate_scales: dict[str, float] | None = None,
    first_step: int = 0,
    **changed,
) -> Part:
    toy = Toy()
    return Part(
        "ar",
        toy,
        dict(toy.named_parameters()),
        replace(settings, **changed),
        World(),
        total_steps=total_steps,
        loss_scaling=loss_scaling,
        rate_scales=rate_scales,
        first_step=first_step,
    )


def pull(part: Part, first: tuple[float, float], second: float) -> None:
    """A backward pass whose gradients are the given numbers."""
    toy = part.component
    part.backward((toy.first * torch.tensor([first])).sum() + second * toy.second.sum())


def values(part: Part) -> list[float]:
    return [value for parameter in part.parameters.values() for value in parameter.detach().flatten().tolist()]


# -- a step ------------------------------------------------------------------------------------------------------------


def test_a_step_is_the_rate_times_the_gradient_and_leaves_no_gradient_behind():
    part = part_of()
    pull(part, (1.0, -2.0), 4.0)
    pull(part, (0.5, 0.0), 0.0)  # of a second chunk: they add up
    part.step(0)
    assert values(part) == pytest.approx([1 - 0.1 * 1.5, 2 + 0.1 * 2, -3 - 0.1 * 4])
    pull(part, (0.0, 1.0), 0.0)
    part.step(1)
    assert values(part) == pytest.approx([0.85, 2.2 - 0.1, -3.4])


def test_gradients_are_clipped_by_their_norm_over_all_weights():
    """|(2, 3, 6)| = 7, so a limit of 3.5 halves them; the norm that is told is the one before."""
    part = part_of(max_grad_norm=3.5)
    pull(part, (2.0, 3.0), 6.0)
    figures = part.step(0)
    assert figures == {"grad_norm": pytest.approx(7.0), "learning_rate": 0.1}
    assert values(part) == pytest.approx([1 - 0.1, 2 - 0.15, -3 - 0.3], abs=1e-6)


@pytest.mark.parametrize("limit", [0.0, 7.1])
def test_gradients_within_the_limit_or_without_one_stay(limit):
    part = part_of(max_grad_norm=limit)
    pull(part, (2.0, 3.0), 6.0)
    assert part.step(0)["grad_norm"] == pytest.approx(7.0)
    assert values(part) == pytest.approx([1 - 0.2, 2 - 0.3, -3 - 0.6])


def test_sgd_has_the_momentum_that_beta1_says():
    """v <- 0.75 v + g: 1, then 0.75 + 2, then 0.75 * 2.75."""
    part = part_of(beta1=0.75)
    at = 1.0
    for step, (gradient, velocity) in enumerate([(1.0, 1.0), (2.0, 2.75), (0.0, 2.0625)]):
        pull(part, (gradient, 0.0), 0.0)
        part.step(step)
        at -= 0.1 * velocity
        assert values(part) == pytest.approx([at, 2.0, -3.0])


def test_adamw_is_its_formula_with_decoupled_decay():
    """Two steps with gradients 1 and 3 under betas 0.5 and 0.8; the large epsilon shows where it is added."""
    part = part_of(name="adamw", beta1=0.5, beta2=0.8, epsilon=0.25, weight_decay=0.3)
    at, mean, square = [1.0, 2.0, -3.0], 0.0, 0.0
    for step, gradient in enumerate([1.0, 3.0]):
        pull(part, (gradient, 0.0), 0.0)
        part.step(step)
        mean, square = 0.5 * mean + 0.5 * gradient, 0.8 * square + 0.2 * gradient**2
        moved = mean / (1 - 0.5 ** (step + 1)) / (math.sqrt(square / (1 - 0.8 ** (step + 1))) + 0.25)
        at = [value * (1 - 0.1 * 0.3) for value in at]
        at[0] -= 0.1 * moved
        assert values(part) == pytest.approx(at, rel=1e-12)


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_rate(scheduler):
    part = part_of(scheduler=scheduler, warmup_steps=4, learning_rate=0.5, min_lr_ratio=0.1, total_steps=100)
    assert [part.learning_rate(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_constant_rate_stays_and_ends_without_decay():
    part = part_of(warmup_steps=1, min_lr_ratio=0.1)
    assert [part.learning_rate(step) for step in (0, 1, 5, 9, 10)] == [0.05, 0.1, 0.1, 0.1, 0.1]


def test_the_rate_of_the_step_is_what_the_optimizer_takes():
    part = part_of(warmup_steps=4)
    pull(part, (1.0, 0.0), 0.0)
    assert part.step(2)["learning_rate"] == pytest.approx(0.06)
    assert values(part)[0] == pytest.approx(1 - 0.06)


# -- fp16 --------------------------------------------------------------------------------------------------------------


def test_scaled_gradients_are_unscaled_before_they_are_clipped():
    part = part_of(loss_scaling=True, max_grad_norm=3.5)
    pull(part, (2.0, 3.0), 6.0)
    assert part.component.second.grad.item() == 6.0 * 65536
    figures = part.step(0)
    assert figures["grad_norm"] == pytest.approx(7.0)
    assert (figures["loss_scale"], figures["skipped_updates"]) == (65536, 0)
    assert values(part) == pytest.approx([0.9, 1.85, -3.3], abs=1e-6)


def test_an_overflow_is_left_out_and_halves_the_scale():
    part = part_of(loss_scaling=True)
    for count in (1, 2):
        pull(part, (math.inf, 1.0), 1.0)
        figures = part.step(0)
        assert (figures["loss_scale"], figures["skipped_updates"]) == (65536 / 2**count, count)
        assert values(part) == [1.0, 2.0, -3.0]
    pull(part, (1.0, 1.0), 1.0)
    assert part.step(0)["skipped_updates"] == 0
    assert values(part) == pytest.approx([0.9, 1.9, -3.1])


def test_overflows_that_do_not_end_stop_the_run():
    part = part_of(loss_scaling=True)
    for _ in range(MAX_SKIPPED - 1):
        pull(part, (math.inf, 1.0), 1.0)
        part.step(6)
    pull(part, (math.inf, 1.0), 1.0)
    with pytest.raises(NonFiniteError, match="overflowed in 20 updates in a row.* in step 7"):
        part.step(6)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(wrong):
    part = part_of(max_grad_norm=1.0)
    pull(part, (wrong, 1.0), 1.0)
    with pytest.raises(NonFiniteError, match=f"the ar half is {wrong}, in step 4"):
        part.step(3)
    assert values(part) == [1.0, 2.0, -3.0]


# -- slow copies -------------------------------------------------------------------------------------------------------


def test_the_old_policy_and_the_reference_stand_in_without_gradient():
    part = part_of()
    toy = part.component
    part.old = ParameterSnapshot(part.parameters)
    with torch.no_grad():
        toy.first.fill_(7.0)
    start = ParameterSnapshot(part.parameters)
    part.reference = start.applied
    with torch.no_grad():
        toy.first.fill_(9.0)
    with part.as_old():
        assert toy.first.tolist() == [[1.0, 2.0]] and not (2 * toy.first).requires_grad
    with part.as_reference():
        assert toy.first.tolist() == [[7.0, 7.0]] and not (2 * toy.first).requires_grad
    assert toy.first.tolist() == [[9.0, 9.0]] and (2 * toy.first).requires_grad


def test_without_an_old_policy_the_part_draws_itself_and_without_a_reference_it_says_so():
    part = part_of()
    with part.as_old():
        assert part.component.first.tolist() == [[1.0, 2.0]]
    with pytest.raises(TrainingError, match="no reference was kept"), part.as_reference():
        pass
    part.reference = nullcontext  # adapters switched off: a context that leaves gradients alone
    with part.as_reference():
        assert not (2 * part.component.first).requires_grad


# -- checkpoints -------------------------------------------------------------------------------------------------------


def moved_part() -> Part:
    """Momentum 0.5, one step with gradient 1 (weights 0.9, 2, -3; velocity 1) and one that overflowed."""
    part = part_of(beta1=0.5, loss_scaling=True)
    part.old = ParameterSnapshot(part.parameters)
    pull(part, (1.0, 0.0), 0.0)
    part.step(0)
    part.average = ParameterSnapshot(part.parameters)
    pull(part, (math.inf, 0.0), 0.0)
    part.step(0)
    return part


def test_a_loaded_part_goes_on_where_the_other_was():
    saved = moved_part().state(with_optimizer=True)
    part = part_of(beta1=0.5, loss_scaling=True)
    part.old, part.average = ParameterSnapshot(part.parameters), ParameterSnapshot(part.parameters)
    with torch.no_grad():
        part.component.first.zero_()
    part.load_state(saved)
    assert values(part) == pytest.approx([0.9, 2.0, -3.0])
    assert (part.skipped, part.scaler.get_scale()) == (1, 32768)
    assert part.old.state_dict()["first"].tolist() == [[1.0, 2.0]]
    assert part.average.state_dict()["first"].tolist() == [[pytest.approx(0.9), 2.0]]
    pull(part, (1.0, 0.0), 0.0)
    part.step(1)
    assert values(part) == pytest.approx([0.9 - 0.1 * 1.5, 2.0, -3.0])


def test_what_a_part_cannot_go_on_from_is_told():
    part, saved = part_of(), part_of().state(with_optimizer=False)
    assert list(saved) == ["ar_weights"]
    with pytest.raises(TrainingError, match="save_optimizer: false"):
        part.load_state(saved)
    with pytest.raises(TrainingError, match="2 names differ"):
        part.load_state({"ar_weights": {"first": torch.zeros(1, 2), "third": torch.zeros(1)}})


def test_weights_of_another_shape_are_refused_before_any_is_taken():
    """One number would go to a whole row."""
    part = part_of()
    saved, before = moved_part().state(with_optimizer=True), values(part)
    saved["ar_weights"] = {**saved["ar_weights"], "first": torch.zeros(1, 1)}
    with pytest.raises(TrainingError, match=r"first has the shape \[1, 1\], and here \[1, 2\]"):
        part.load_state(saved)
    assert values(part) == before


# -- the slow average, and rates of their own --------------------------------------------------------------------------


def test_the_average_sets_out_from_the_weights_and_moves_by_its_share() -> None:
    """SGD with rate .1 and gradient 1 takes .1 off `second` at each step: -3, -3.1, -3.2, -3.3."""
    part = part_of()
    part.ema = WeightAverage(ParameterSnapshot(part.parameters, torch.float64), decay=0.75, start=1)
    found = []
    for step in range(3):
        part.parameters["second"].grad = torch.ones(1, 1, dtype=torch.float64)
        part.step(step)
        found.append(part.ema.snapshot.state_dict()["second"].item())
    # the weights themselves before its start, then .75 of itself and .25 of the weights
    assert found == pytest.approx([-3.1, 0.75 * -3.1 + 0.25 * -3.2, 0.75 * -3.125 + 0.25 * -3.3], abs=1e-12)
    with as_shown({"ar": part}, "evaluation"):
        assert part.parameters["second"].item() == pytest.approx(found[-1], abs=1e-12)
    assert part.parameters["second"].item() == pytest.approx(-3.3, abs=1e-12)


def test_a_step_that_fails_leaves_the_average_where_it_is() -> None:
    part = part_of()
    part.ema = WeightAverage(ParameterSnapshot(part.parameters, torch.float64), decay=0.5, start=0)
    part.parameters["second"].grad = torch.full((1, 1), math.nan, dtype=torch.float64)
    with pytest.raises(NonFiniteError):
        part.step(0)
    assert part.ema.snapshot.state_dict()["second"].item() == -3.0


def test_the_average_of_bf16_weights_moves_by_less_than_bf16_can_tell() -> None:
    """A share of 2e-4 of a gap of 1 is far below the 2^-8 of a bf16 weight of 1: kept in bf16 it would never move."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = WeightAverage(ParameterSnapshot({"w": weight}, torch.float32), decay=0.9998, start=0)
    with torch.no_grad():
        weight.fill_(2.0)
    for step in range(2000):
        average.follow(step)
    moved = average.snapshot.state_dict()["w"] - 1
    torch.testing.assert_close(moved, torch.full((4,), 1 - 0.9998**2000), rtol=0, atol=2000 * 2**-24 * 2)


def test_a_checkpoint_brings_the_average_back() -> None:
    part, other = part_of(), part_of()
    for one in (part, other):
        one.ema = WeightAverage(ParameterSnapshot(one.parameters, torch.float64), decay=0.5, start=0)
    part.parameters["second"].grad = torch.ones(1, 1, dtype=torch.float64)
    part.step(0)
    state = part.state(with_optimizer=True)
    assert state["ar_ema"]["second"].item() == pytest.approx(-3.05, abs=1e-12)
    other.load_state(state)
    assert other.ema.snapshot.state_dict()["second"].item() == state["ar_ema"]["second"].item()


def test_a_parameter_learns_at_its_share_of_the_rate() -> None:
    part = part_of(rate_scales={"first": 0.25})
    for parameter in part.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    assert part.step(0)["learning_rate"] == 0.1
    torch.testing.assert_close(part.parameters["first"].detach(), torch.tensor([[0.975, 1.975]]).double())
    assert part.parameters["second"].item() == pytest.approx(-3.1, abs=1e-12)


def test_a_part_that_starts_late_counts_its_schedule_from_there() -> None:
    """Warmup of 1 step from step 4 on, then linear to 0 at the last of 10 steps: shares 1/2, 1, 3/4, ..., 0."""
    part = part_of(scheduler="linear", warmup_steps=1, first_step=4)
    assert [part.learning_rate(step) for step in (4, 5, 6, 9)] == pytest.approx([0.05, 0.1, 0.075, 0.0], abs=1e-12)
