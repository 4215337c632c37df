"""The on-policy gate against one planted fault each: it stops the run, says where numbers part, and what it looks like.

Every fault is planted where it would really happen, on the random tiny model; the same run without it passes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glm_training.engine.errors import GateError
from glm_training.models.glm_image import ar as ar_module
from glm_training.models.lora import adapters_disabled
from glm_training.trainers import reward_trainer
from tests.runs import trainer_of

AR = ["model.component=ar", "reward.grpo.num_samples=2", "training.batch_size=1"]
DIT = ["model.component=dit", "reward.grpo.num_samples=2", "training.batch_size=1"]
LORA = [
    "lora.enabled=true",
    "lora.rank=2",
    "lora.alpha=8",
    "training.optimizer=adamw",
    "training.learning_rate=0.02",
    "reward.grpo.gate_interval=1",
]


@pytest.fixture
def drawing(monkeypatch):
    """Changes what a rollout hands over: `drawing(change)` with change(rollout) -> None."""

    def plant(change):
        real = reward_trainer.draw_rollout

        def changed(*arguments, **options):
            rollout = real(*arguments, **options)
            change(rollout)
            return rollout

        monkeypatch.setattr(reward_trainer, "draw_rollout", changed)

    return plant


def advance(trainer):
    figures = trainer.training_step()
    trainer.step += 1
    return figures


def fails(trainer) -> str:
    with pytest.raises(GateError) as caught:
        trainer.training_step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("offset", "first", "looks_like"),
    [
        (lambda prompt: 1, "token 1 (preview grid, row 0, column 1)", "the grids were drawn one position too late"),
        (
            lambda prompt: (torch.arange(prompt.T) >= prompt.preview_length) * -prompt.grids[0][0],
            "token 257 (large grid, row 0, column 1)",
            "the large grid was drawn as if it began with the first of the preview",
        ),
    ],
)
def test_wrong_positions(tmp_path, monkeypatch, offset, first, looks_like):
    assert trainer_of(tmp_path, *AR).training_step()["gate/ar_log_prob_max"] <= 1e-5
    real = ar_module.write_tokens

    def misplaced(model, prompt, *arguments):
        moved = replace(prompt, decode_position_ids=prompt.decode_position_ids + offset(prompt))
        return real(model, moved, *arguments)

    monkeypatch.setattr(ar_module, "write_tokens", misplaced)
    message = fails(trainer_of(tmp_path, *AR))
    assert first in message and "before any update" in message
    assert f"Looks like this: wrong positions: {looks_like}" in message


def test_positions_of_no_known_mistake_leave_token_0_alone(tmp_path, monkeypatch):
    real = ar_module.write_tokens

    def scrambled(model, prompt, *arguments):
        return real(model, replace(prompt, decode_position_ids=prompt.decode_position_ids.flip(0)), *arguments)

    monkeypatch.setattr(ar_module, "write_tokens", scrambled)
    message = fails(trainer_of(tmp_path, *AR))
    assert "Looks like" not in message
    assert "Token 0 depends on the prompt alone and agrees" in message and "positions" in message


def test_temperature_mismatch(tmp_path, drawing):
    settings = [*AR, "model.ar.temperature=1.0"]
    assert trainer_of(tmp_path, *settings).training_step()["gate/ar_log_prob_max"] <= 1e-5
    drawing(lambda rollout: setattr(rollout.plans, "temperature", 0.9))
    message = fails(trainer_of(tmp_path, *settings))
    assert "token 0 (preview grid, row 0, column 0)" in message
    assert "Looks like this: temperature 1 drew the tokens and 0.9 scores them" in message


def test_top_p_without_its_support(tmp_path, drawing):
    settings = [*AR, "model.ar.top_p=0.75"]
    assert trainer_of(tmp_path, *settings).training_step()["gate/ar_log_prob_max"] <= 1e-5
    drawing(lambda rollout: setattr(rollout.plans, "support", None))
    message = fails(trainer_of(tmp_path, *settings))
    assert "token 0 (preview grid" in message
    assert "Looks like this: top-p (about 0.75) drew the tokens and its support is missing in the replay" in message


def test_a_support_that_the_drawn_log_probs_leave_out(tmp_path, monkeypatch, drawing):
    def over_all_codes(rollout):
        with torch.no_grad():
            plans = rollout.plans
            rollout.plans.log_probs = component(plans.prompt, plans.tokens, temperature=plans.temperature)

    drawing(over_all_codes)
    trainer = trainer_of(tmp_path, *AR, "model.ar.top_p=0.75")
    component = trainer.family.ar
    assert "without the top-p support" in fails(trainer)


def test_dropped_guidance(tmp_path, drawing):
    settings = [*DIT, "rollout.guidance_scale=1.5"]
    assert trainer_of(tmp_path, *settings).training_step()["gate/dit_ratio_max"] <= 1e-5
    drawing(lambda rollout: setattr(rollout, "renders", replace(rollout.renders, guidance_scale=1.0)))
    message = fails(trainer_of(tmp_path, *settings))
    assert "denoising step 0 (timestep 999) of sample 0" in message
    assert "guidance was left out: guidance 1.5 drew the steps and 1 scores them" in message


def test_wrong_timesteps(tmp_path, drawing):
    def shift(rollout):
        schedule = rollout.renders.schedule
        later = replace(schedule, timesteps=(schedule.sigmas[:-1] * 1000).trunc().clamp(max=999))
        rollout.renders = replace(rollout.renders, schedule=later)

    trainer = trainer_of(tmp_path, *DIT)
    drawing(shift)
    message = fails(trainer)
    assert "denoising step 1" in message and "timestep" in message.split("Li")[1]


@pytest.mark.parametrize("half", [AR, DIT])
def test_an_adapter_that_was_off_while_drawing(tmp_path, monkeypatch, half):
    sound = trainer_of(tmp_path, *half, *LORA)
    advance(sound)
    figures = advance(sound)
    assert max(value for name, value in figures.items() if name.startswith("gate/")) <= 1e-4

    trainer = trainer_of(tmp_path, *half, *LORA)
    advance(trainer)
    real = reward_trainer.draw_rollout

    def without_adapter(family, *arguments, **options):
        with adapters_disabled(family.module("ar" if half is AR else "dit")):
            return real(family, *arguments, **options)

    monkeypatch.setattr(reward_trainer, "draw_rollout", without_adapter)
    message = fails(trainer)
    assert "before the update of step 2" in message
    assert "Looks like this: the adapter was switched off" in message


def test_stale_weights(tmp_path, monkeypatch):
    """The rollout of step 2 is drawn with the weights of step 1."""
    settings = [*DIT, "training.learning_rate=1.0", "reward.grpo.gate_interval=1"]
    trainer = trainer_of(tmp_path, *settings)
    advance(trainer)
    real = reward_trainer.draw_rollout

    def stale(*arguments, **options):
        with trainer.parts["dit"].as_reference():
            return real(*arguments, **options)

    monkeypatch.setattr(reward_trainer, "draw_rollout", stale)
    message = fails(trainer)
    assert "denoising step 0" in message and "drawn with the reference's weights" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_stored_in_low_precision(tmp_path, drawing, dtype):
    def store(rollout):
        rollout.renders = replace(rollout.renders, stored=rollout.renders.stored.to(dtype).float())

    assert trainer_of(tmp_path, *DIT).training_step()["gate/dit_ratio_max"] <= 1e-5
    drawing(store)
    message = fails(trainer_of(tmp_path, *DIT))
    assert f"latents before denoising step 0 (timestep 999) hold {str(dtype)[6:]} numbers" in message
    assert "stored in low precision" in message


def test_it_checks_first_and_then_every_so_many_steps(tmp_path):
    trainer = trainer_of(tmp_path, *DIT, "reward.grpo.gate_interval=2")
    seen = [any(name.startswith("gate/") for name in advance(trainer)) for _ in range(5)]
    assert seen == [True, False, True, False, True]


def test_without_an_interval_it_checks_before_the_first_update_alone(tmp_path):
    trainer = trainer_of(tmp_path, *DIT, "reward.grpo.gate_interval=null")
    assert [any(name.startswith("gate/") for name in advance(trainer)) for _ in range(3)] == [True, False, False]


def test_a_resumed_run_checks_its_first_step(tmp_path, drawing):
    settings = [*DIT, "training.max_steps=3", "checkpoint.save_total_limit=5"]
    trainer_of(tmp_path, *settings, "logging.save_interval=1").train()
    drawing(lambda rollout: setattr(rollout, "renders", replace(rollout.renders, guidance_scale=1.5)))
    resume = f"checkpoint.resume_from={tmp_path}/run/checkpoints/step-000002"
    with pytest.raises(GateError, match="before the update of step 3"):
        trainer_of(tmp_path, *settings, resume).train()


def test_a_resumed_run_logs_the_checks_that_an_undisturbed_one_makes(tmp_path):
    whole = trainer_of(tmp_path, *DIT, "reward.grpo.gate_interval=2", "reward.grpo.kl_coef=0.1")
    first = advance(whole)
    resumed = trainer_of(tmp_path, *DIT, "reward.grpo.gate_interval=2", "reward.grpo.kl_coef=0.1")
    resumed.load_extra_state(whole.extra_state())
    resumed.step = 1
    seen = [{name for name in advance(resumed) if name.startswith("gate/")} for _ in range(3)]
    assert {"gate/dit_ratio_max", "gate/dit_reference_max"} <= first.keys()
    assert seen == [set(), {"gate/dit_ratio_max"}, set()]
