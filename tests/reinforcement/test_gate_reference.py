"""Before anything is learned the KL to the reference is zero, and pulls once the reference is moved away."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from glm_training.engine.errors import GateError
from glm_training.engine.parts import Part
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.reinforcement.gate.reference import check_ar_reference, check_dit_reference
from glm_training.reinforcement.gate.tolerance import Tolerance
from tests.runs import trainer_of

SMALL = ["reward.grpo.num_samples=2", "training.batch_size=1"]
ROLLOUT = {"ar": [], "flow_grpo": [], "nft": ["reward.grpo.dit.method=nft"], "dgpo": ["reward.grpo.dit.method=dgpo"]}


def settings(half: str) -> list[str]:
    return [f"model.component={'ar' if half == 'ar' else 'dit'}", *SMALL, *ROLLOUT[half]]


@pytest.mark.parametrize("extra", [[], ["lora.enabled=true", "lora.rank=2"], ["training.gradient_checkpointing=true"]])
@pytest.mark.parametrize("half", ["ar", "flow_grpo", "nft", "dgpo"])
def test_a_sound_run_passes_and_keeps_no_gradient(tmp_path, monkeypatch, half, extra):
    trainer = trainer_of(tmp_path, *settings(half), *extra)
    part = next(iter(trainer.parts.values()))
    left = []
    monkeypatch.setattr(Part, "backward", lambda self, loss: left.append([p.grad for p in self.parameters.values()]))
    monkeypatch.setattr(Part, "step", lambda self, step: {})
    figures = trainer.training_step()
    assert figures[f"gate/{part.name}_reference_max"] <= 1e-6
    if half == "dgpo":  # at the reference nothing is preferred yet
        assert figures["dit/preference_accuracy"] == 0.5 and figures["dit/kl"] <= 1e-12
        assert figures["dit/loss"] == pytest.approx(math.log(2) / 100, rel=1e-4)
    assert set(left[0]) == {None}


@pytest.mark.parametrize("half", ["ar", "flow_grpo", "nft"])
def test_a_reference_that_is_another_model_is_refused(tmp_path, monkeypatch, half):
    trainer = trainer_of(tmp_path, *settings(half))
    part = next(iter(trainer.parts.values()))

    @contextmanager
    def another():
        values = [parameter.detach().clone() for parameter in part.parameters.values()]
        with torch.no_grad():
            for parameter in part.parameters.values():
                parameter.mul_(1.01)
            yield
            for parameter, value in zip(part.parameters.values(), values, strict=True):
                parameter.copy_(value)

    monkeypatch.setattr(part, "as_reference", another)
    with pytest.raises(GateError, match="differs from its KL reference before any update.*not the starting model"):
        trainer.training_step()


@pytest.mark.parametrize("half", ["ar", "flow_grpo", "nft"])
def test_a_forward_pass_without_gradient_is_refused(tmp_path, monkeypatch, half):
    trainer = trainer_of(tmp_path, *settings(half))
    component = next(iter(trainer.parts.values())).component
    monkeypatch.setattr(component, "forward", torch.no_grad()(component.forward))
    with pytest.raises(GateError, match="has no gradient in any trained weight"):
        trainer.training_step()


def test_trained_weights_that_take_no_gradient_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, *settings("ar"), "lora.enabled=true", "lora.rank=2")
    for parameter in trainer.parts["ar"].parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(GateError, match="has no gradient in any trained weight"):
        trainer.training_step()


def test_without_a_reference_there_is_nothing_to_compare(tmp_path):
    figures = trainer_of(tmp_path, *settings("ar"), "reward.grpo.kl_coef=0").training_step()
    assert "gate/ar_log_prob_max" in figures and "gate/ar_reference_max" not in figures


def test_plans_without_a_choice_have_no_gradient_and_pass(tmp_path):
    """A nucleus of one code makes every token certain: that is no fault of the reference."""
    trainer = trainer_of(tmp_path, *settings("ar"), "rollout.top_p=1e-6")
    rollout = trainer.draw(*trainer.next_batch(), on_step=None)
    assert not rollout.plans.log_probs.any()
    figures = trainer.gate.check(0, rollout, trainer.ar_method, None)
    assert figures["gate/ar_reference_max"] == 0


# -- by hand, on one weight of 2 whose reference is 1.5 ----------------------------------------------------------------


class OneWeight(torch.nn.Module):
    """Scores values x as -w x, and as a velocity w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0))
        self.asked: list[tuple[list[float], object, float]] = []

    def forward(self, latents, times, condition, *, guidance_scale):
        self.asked.append((times.tolist(), condition, guidance_scale))
        return self.w * latents


class Scores:
    """An AR method: log-probs -w x."""

    def score(self, component, plans):
        return -component.w * plans


class Steps(FlowPolicyGradient):
    """A flow method whose step k has the log-probs -w x_k and a mean that w scales."""

    def replay(self, policy, trajectory, step):
        values = trajectory.steps[step]
        return SimpleNamespace(log_prob=-policy.w * values, mean=policy.w * values[:, None], std=torch.tensor(1.0))


@pytest.fixture
def part() -> SimpleNamespace:
    component = OneWeight()

    @contextmanager
    def as_reference():
        with torch.no_grad():
            component.w.fill_(1.5)
            yield
            component.w.fill_(2.0)

    found = SimpleNamespace(name="dit", component=component, parameters={"w": component.w}, as_reference=as_reference)
    found.has_gradient = lambda loss: Part.has_gradient(found, loss)
    return found


def renders() -> SimpleNamespace:
    """Two rows of 2 x 2 numbers: of root mean square 1 and 4."""
    final = torch.tensor([[[1.0, -1.0], [1.0, 1.0]], [[4.0, 4.0], [-4.0, 4.0]]])[:, None]
    steps = {1: torch.tensor([2.0, 6.0]), 3: torch.tensor([100.0, 100.0])}
    schedule = SimpleNamespace(timesteps=torch.tensor([999.0, 499.0]))
    return SimpleNamespace(
        final=final, steps=steps, sde_indices=(1, 3), schedule=schedule, condition="condition", guidance_scale=1.5
    )


def asked_of(half: str, part, tolerance: float, at_start: bool) -> float:
    if half == "ar":
        plans = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        return check_ar_reference(Scores(), part, plans, Tolerance(tolerance), at_start=at_start)
    method = Steps(clip=(0.1, 0.1), kl_coef=1.0) if half == "steps" else object()
    return check_dit_reference(method, part, renders(), Tolerance(tolerance), at_start=at_start)


@pytest.mark.parametrize(("half", "distance"), [("ar", 2.0), ("steps", 3.0), ("velocity", 2.0)])
def test_the_distance_is_the_largest_and_only_a_run_that_begins_must_have_none(part, half, distance):
    """|2 - 1.5| times the largest value: a token of 4, the 6 of the first noisy step, a velocity of 4."""
    assert asked_of(half, part, 0.1, False) == pytest.approx(distance)
    assert asked_of(half, part, distance + 0.01, True) == pytest.approx(distance)
    with pytest.raises(GateError, match=rf"by up to {distance:.2f}e\+00 \(allowed 1e-01\)"):
        asked_of(half, part, 0.1, True)
    assert part.component.w.grad is None


@pytest.mark.parametrize("half", ["ar", "steps", "velocity"])
def test_a_weight_that_is_not_trained_has_no_gradient_to_the_reference(part, half):
    part.component.w.requires_grad_(False)
    with pytest.raises(GateError, match="the KL of the dit half to its reference has no gradient"):
        asked_of(half, part, 0.1, False)


def test_a_velocity_is_compared_at_the_last_noise_level(part):
    asked_of("velocity", part, 0.1, False)
    assert part.component.asked == [([499.0, 499.0], "condition", 1.5)] * 2
