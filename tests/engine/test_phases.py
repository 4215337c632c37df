"""What is said when memory or numbers give out: the phase, the keys to change, the checkpoint."""

from __future__ import annotations

import pytest
import torch

from glm_training.cli import training
from glm_training.config import iter_keys
from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.errors import DeviceMemoryError, NonFiniteError
from glm_training.engine.parts import MAX_SKIPPED, Part
from glm_training.engine.phases import ADVICE, REMEDIES, SPENT, guarded
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.reinforcement import updates
from glm_training.rewards import RewardCalculator
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of

SMALL = ["model.component=dit", "training.batch_size=1", "reward.grpo.num_samples=2"]


def full(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("kind", "name", "phase"),
    [
        (DiTComponent, "sample", "rollout"),
        (RewardCalculator, "compute_rewards", "reward"),
        (Part, "backward", "DiT update"),
    ],
)
def test_a_full_device_names_phase_and_keys(tmp_path, monkeypatch, kind, name, phase):
    trainer = trainer_of(tmp_path, *SMALL, "rollout.micro_batch_size=2", "training.gradient_checkpointing=true")
    trainer.step = 7
    monkeypatch.setattr(kind, name, full)
    with pytest.raises(DeviceMemoryError) as caught:
        trainer.training_step()
    message = str(caught.value)
    assert f"Phase: {phase}, after 7 finished steps" in message and "resume.accept" in message
    assert "training.batch_size (now 1)" not in message and "training.gradient_checkpointing (now" not in message
    assert ("rollout.micro_batch_size (now 2)" in message) == (phase != "reward")
    assert "reward.grpo.num_samples (now 2)" in message


@pytest.mark.parametrize("enabled", [False, True])
def test_adapters_are_advised_to_who_has_none(tmp_path, enabled):
    config = config_of(tmp_path, f"lora.enabled={str(enabled).lower()}", "training.optimizer=adamw")
    with pytest.raises(DeviceMemoryError) as caught, guarded("AR update", config, World(), 0):
        full()
    assert ("lora.enabled (now" in str(caught.value)) == (not enabled)
    assert "training.optimizer (now adamw)" in str(caught.value)


def test_a_full_device_in_an_evaluation_or_while_loading_exits_1_and_names_the_checkpoint(
    tmp_path, monkeypatch, capsys
):
    config = config_of(tmp_path, *SMALL, "evaluation.enabled=true", "training.max_steps=1")
    monkeypatch.setattr(DiTComponent, "sample", full)
    assert training._train(config) == training.EXIT_FAILED
    error = capsys.readouterr().err
    assert "Phase: evaluation, after 0 finished steps" in error
    assert f"--resume continues from {tmp_path}/run/checkpoints/step-000000" in error
    monkeypatch.setattr("glm_training.engine.setup.build_parts", full)
    assert training._train(config, overwrite=True) == training.EXIT_FAILED
    assert "Phase: loading" in capsys.readouterr().err


def test_every_key_that_is_named_exists_and_has_advice():
    known = set(iter_keys())
    assert {key for keys in REMEDIES.values() for key in keys} == set(ADVICE) <= known
    assert set(SPENT) <= known


def test_nothing_left_to_change_is_said(tmp_path):
    config = config_of(tmp_path, "checkpoint.save_lora_only=true", "lora.enabled=true")
    with pytest.raises(DeviceMemoryError, match="take a larger device"), guarded("saving", config, World(), 1):
        full()


def test_other_errors_pass(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match="^as it is$"), guarded("rollout", config, World(), 1):
        raise ValueError("as it is")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("transformer", r"rollout: sampling ended in NaN.*in step 1"),
        ("vae", r"rollout: the VAE decodes to NaN.*in step 1"),
        ("lm_head", r"rollout: the AR model gives logits that are not finite.*in step 1"),
    ],
)
def test_values_that_are_not_finite_name_the_phase(tmp_path, broken, message):
    trainer = trainer_of(tmp_path, *SMALL)
    dit = trainer.family.dit
    weights = {
        "transformer": dit.transformer.proj_out.weight,
        "vae": dit.vae.decoder.conv_out.weight,
        "lm_head": trainer.family.ar.model.lm_head.weight,
    }
    weights[broken].data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=message):
        trainer.training_step()


def test_non_finite_values_in_an_update_name_it(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, *SMALL, "reward.grpo.gate=false")
    real = updates.update_dit

    def diverged(*arguments):
        trainer.family.dit.transformer.proj_out.weight.data.fill_(float("inf"))
        return real(*arguments)

    monkeypatch.setattr(updates, "update_dit", diverged)
    with pytest.raises(NonFiniteError, match="(DiT update: .* holds NaN|norm of the dit half is nan).*in step 1"):
        trainer.training_step()


def scaled_part() -> Part:
    module = torch.nn.Linear(2, 1)
    settings = ResolvedOptimizer("sgd", 0.1, 0.0, 0.9, 1e-8, 0.0, 1.0, "constant", 0, 0.0)
    return Part("ar", module, dict(module.named_parameters()), settings, World(), total_steps=9, loss_scaling=True)


def overflow(part: Part, value: float) -> dict[str, float]:
    part.backward(part.component(torch.ones(1, 2)).sum() * value)
    return part.step(0)


def test_overflows_are_skipped_counted_and_bounded():
    part = scaled_part()
    before = part.component.weight.detach().clone()
    for skipped in range(1, MAX_SKIPPED):
        assert overflow(part, float("inf"))["skipped_updates"] == skipped
    assert torch.equal(part.component.weight, before)
    other = scaled_part()
    other.load_state(part.state(with_optimizer=True))
    with pytest.raises(NonFiniteError, match=f"overflowed in {MAX_SKIPPED} updates in a row.*mixed_precision"):
        overflow(other, float("inf"))
    assert overflow(part, 1.0)["skipped_updates"] == 0
    assert not torch.equal(part.component.weight, before)
    assert overflow(part, float("inf"))["skipped_updates"] == 1
