"""Before anything is learned the KL to the reference is zero, and pulls once the reference is moved away."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from glm_training.engine.errors import GateError
from glm_training.engine.parts import Part
from tests.runs import trainer_of

SMALL = ["reward.grpo.num_samples=2", "training.batch_size=1"]
ROLLOUT = {"ar": [], "flow_grpo": [], "nft": ["reward.grpo.dit.method=nft"]}


def settings(half: str) -> list[str]:
    return [f"model.component={'ar' if half == 'ar' else 'dit'}", *SMALL, *ROLLOUT[half]]


@pytest.mark.parametrize("extra", [[], ["lora.enabled=true", "lora.rank=2"], ["training.gradient_checkpointing=true"]])
@pytest.mark.parametrize("half", ["ar", "flow_grpo", "nft"])
def test_a_sound_run_passes_and_keeps_no_gradient(tmp_path, monkeypatch, half, extra):
    trainer = trainer_of(tmp_path, *settings(half), *extra)
    part = next(iter(trainer.parts.values()))
    left = []
    monkeypatch.setattr(Part, "backward", lambda self, loss: left.append([p.grad for p in self.parameters.values()]))
    monkeypatch.setattr(Part, "step", lambda self, step: {})
    figures = trainer.training_step()
    assert figures[f"gate/{part.name}_reference_max"] <= 1e-6
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
