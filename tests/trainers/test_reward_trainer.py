"""What a reward step does: which weights move, at which rates, what is logged, and the gate in front of it."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from glm_training.config import load_config
from glm_training.data import Batch
from glm_training.engine.clock import Clock
from glm_training.engine.errors import GateError, NonFiniteError, SettingsError, TrainingError
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.models.glm_image import ar as ar_module
from glm_training.reinforcement import updates
from glm_training.trainers import reward_trainer
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of, weights_of


def moved(before, after) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("use_reward", ["true", "false"])
@pytest.mark.parametrize("half", ["ar", "dit", "both"])
def test_only_the_selected_half_moves(tmp_path, half, use_reward):
    trainer = trainer_of(tmp_path, f"model.component={half}", f"training.use_reward={use_reward}")
    modules = {"ar": trainer.family.ar.model, "dit": trainer.family.dit.transformer}
    frozen = [trainer.family.dit.vae, trainer.family.dit.text_encoder]
    before = {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
    kept = [{k: v.clone() for k, v in module.state_dict().items()} for module in frozen]
    trainer.training_step()
    for name, module in modules.items():
        assert moved(before[name], module.state_dict()) == (half in (name, "both")), name
    assert not any(moved(old, module.state_dict()) for old, module in zip(kept, frozen, strict=True))
    vision = {k: v for k, v in before["ar"].items() if "visual" in k or "vqmodel" in k}
    assert vision and not moved(vision, modules["ar"].state_dict())


def test_each_half_has_its_own_learning_rate(tmp_path):
    rates = ["training.ar_learning_rate=0.02", "training.dit_learning_rate=0.005"]
    figures = trainer_of(tmp_path, *rates).training_step()
    assert figures["ar/learning_rate"] == 0.02
    assert figures["dit/learning_rate"] == 0.005


def test_before_the_first_update_ratios_are_one_and_kl_zero(tmp_path):
    figures = trainer_of(tmp_path, "model.ar.top_p=0.75").training_step()
    assert figures["gate/ar_log_prob_max"] <= 1e-5
    assert figures["gate/dit_ratio_max"] <= 1e-5
    for half in ("ar", "dit"):
        assert abs(figures[f"{half}/kl"]) <= 1e-9
        assert figures[f"{half}/ratio_deviation_max"] <= 1e-4


def test_kl_to_the_start_grows_once_the_weights_moved(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.training_step()
    trainer.step += 1
    figures = trainer.training_step()
    assert figures["ar/kl"] > 0 and figures["dit/kl"] > 0


def test_the_gate_names_the_first_token_of_a_broken_position_schedule(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "model.component=ar")
    real = ar_module.ARComponent.forward

    def with_text_positions(self, prompt, tokens, **options):
        """What the stock forward does in teacher forcing: the generated part gets a text ramp."""
        ramp = prompt.decode_position_ids[:, :, :1] + torch.arange(prompt.T)
        broken = type(prompt)(**{**prompt.__dict__, "decode_position_ids": ramp})
        return real(self, broken, tokens, **options)

    monkeypatch.setattr(ar_module.ARComponent, "forward", with_text_positions)
    with pytest.raises(GateError, match=r"token \d+ \(preview grid, row 0, column \d+\).*positions"):
        trainer.training_step()


def test_the_gate_catches_a_replay_without_guidance(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "model.component=dit", "rollout.guidance_scale=3.0")
    real = type(trainer.family.dit).forward
    state = {"sampling": True}

    def forgetful(self, *arguments, guidance_scale=1.0, **options):
        return real(self, *arguments, guidance_scale=guidance_scale if state["sampling"] else 1.0, **options)

    monkeypatch.setattr(type(trainer.family.dit), "forward", forgetful)
    check = trainer.gate.check  # type: ignore[attr-defined]

    def gate_after_sampling(*arguments):
        state["sampling"] = False
        return check(*arguments)

    monkeypatch.setattr(trainer.gate, "check", gate_after_sampling)  # type: ignore[attr-defined]
    with pytest.raises(GateError, match=r"denoising step 0 .*guidance"):
        trainer.training_step()


def test_logged_rewards_are_raw_means(tmp_path):
    trainer = trainer_of(tmp_path)
    seen = []
    real = trainer.calculator.compute_rewards

    def spy(batch):
        result = real(batch)
        seen.append(result)
        return result

    trainer.calculator.compute_rewards = spy
    figures = trainer.training_step()
    hand = sum(result.components["structure"].sum().item() for result in seen) / sum(len(r.total) for r in seen)
    assert figures["reward/structure"] == pytest.approx(hand, abs=1e-7)
    assert figures["reward/total"] == pytest.approx(hand, abs=1e-7)
    assert 0 <= figures["reward/plan_variance_share"] <= 1


def test_changing_the_source_changes_loss_and_samples(tmp_path):
    def run(shift: float):
        trainer = trainer_of(tmp_path, mode="i2i")
        real = trainer.dataset.batch

        def shifted(indices, **options):
            batch = real(indices, **options)
            batch.sources = (batch.sources * (1 - shift)).contiguous()
            return batch

        trainer.dataset.batch = shifted  # type: ignore[method-assign]
        images = []
        score = trainer.calculator.compute_rewards
        trainer.calculator.compute_rewards = lambda batch: images.append(batch.images) or score(batch)
        return trainer.training_step(), images[0]

    (figures, images), (other_figures, other_images) = run(0.0), run(0.7)
    assert not torch.allclose(images, other_images)
    assert figures["reward/total"] != other_figures["reward/total"]
    assert figures["dit/grad_norm"] != other_figures["dit/grad_norm"]


def test_when_only_the_ar_half_learns_its_plans_share_the_render_noise(tmp_path):
    trainer = trainer_of(tmp_path, "model.component=ar")
    assert trainer.settings.share_render_noise  # type: ignore[attr-defined]


def test_shuffled_advantages_are_the_same_numbers_elsewhere(tmp_path):
    from glm_training.reinforcement.credit import _shuffled

    values = torch.arange(12.0).view(3, 4)
    scored = values != 5
    shuffled = _shuffled(values, scored, 1, "plan", 5)
    assert not torch.equal(values, shuffled) and shuffled[1, 1] == 5, "what has no score gets none of another's"
    assert torch.equal(values.flatten(), shuffled.flatten().sort().values)
    assert torch.equal(shuffled, _shuffled(values, scored, 1, "plan", 5))


def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(tmp_path):
    trainer = trainer_of(tmp_path, "model.component=ar", "training.max_grad_norm=1")
    part = trainer.parts["ar"]
    before = weights_of(trainer)
    next(iter(part.parameters.values())).grad = None
    for parameter in part.parameters.values():
        parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(NonFiniteError, match="ar half is inf, in step 1"):
        part.step(0)
    assert not moved(before["ar"], dict(part.parameters))


def test_updates_that_do_not_divide_the_samples_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="does not divide"):
        trainer_of(tmp_path, "reward.grpo.updates_per_rollout=3")


def test_supervised_steps_stand_between_reward_steps(tmp_path):
    trainer = trainer_of(tmp_path, "training.reward_frequency=2")
    first = trainer.training_step()
    trainer.step += 1
    second = trainer.training_step()
    assert "ar/large_loss" in first and "reward/total" not in first
    assert "reward/total" in second and "ar/large_loss" not in second


def test_lora_moves_adapters_alone(tmp_path):
    trainer = trainer_of(tmp_path, "lora.enabled=true", "lora.rank=2", "lora.alpha=4")
    base = {
        name: value.detach().clone()
        for module in (trainer.family.ar.model, trainer.family.dit.transformer)
        for name, value in module.named_parameters()
        if "lora_" not in name
    }
    before = weights_of(trainer)
    figures = trainer.training_step()
    assert abs(figures["ar/kl"]) <= 1e-9
    for half in before:
        assert all("lora_" in name for name in before[half])
        assert moved(before[half], dict(trainer.parts[half].parameters))
    for module in (trainer.family.ar.model, trainer.family.dit.transformer):
        for name, value in module.named_parameters():
            if "lora_" not in name:
                assert torch.equal(base[name], value), name


def test_the_run_directory_holds_what_it_promises(tmp_path):
    trainer = trainer_of(tmp_path, "logging.log_images=true", "logging.use_tensorboard=true", "evaluation.enabled=true")
    result = trainer.train()
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward/total" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval/total" in line] == [0, 2]
    assert load_config(run / "config.yaml") == trainer.config, "it starts the same run again"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000002"
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["before_after.png", "step-000000", "step-000002"]
    assert any((run / "tensorboard").iterdir())
    assert result.before.keys() == result.after.keys() == {"total", "structure"}


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_dropout_of_supervised_steps_comes_from_the_runs_seed(tmp_path, checkpointing):
    runs = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)  # whatever else the process has drawn
        trainer = trainer_of(
            tmp_path,
            "training.use_reward=false",
            "lora.enabled=true",
            "lora.dropout=0.5",
            f"training.gradient_checkpointing={checkpointing}",
            f"seed={3 if len(runs) < 2 else 4}",
        )
        state = torch.random.get_rng_state()
        trainer.training_step()
        assert torch.equal(torch.random.get_rng_state(), state)
        runs.append(weights_of(trainer))
    assert not moved(runs[0]["ar"], runs[1]["ar"]) and not moved(runs[0]["dit"], runs[1]["dit"])
    assert moved(runs[1]["dit"], runs[2]["dit"])


def test_a_step_draws_in_evaluation_mode_learns_in_training_mode_and_is_told_by_its_number(tmp_path, monkeypatch):
    """The sixth step, at which five are finished."""
    trainer = trainer_of(tmp_path, "model.component=ar", "reward.grpo.num_samples=2", "training.batch_size=1")
    trainer.step = 5
    modes, told = [], []
    draw = reward_trainer.draw_rollout

    def noted(*arguments, **named):
        modes.append(("draw", trainer.family.ar.model.training, trainer.family.dit.transformer.training))
        return draw(*arguments, **named)

    def learn(learning, method, chunks):
        modes.append(("learn", trainer.family.ar.model.training, trainer.family.dit.transformer.training))
        return {"ar/kl": 0.25}

    monkeypatch.setattr(reward_trainer, "draw_rollout", noted)
    monkeypatch.setattr(updates, "update_ar", learn)
    monkeypatch.setattr(trainer.monitors, "after_step", lambda step, figures: told.append((step, figures["ar/kl"])))
    trainer.family.train()
    trainer.training_step()
    assert modes == [("draw", False, False), ("learn", True, True)] and told == [(6, 0.25)]


def windows(tmp_path, *keys: str, steps: int, method=None, denoising: int = 6) -> list[tuple[int, ...]]:
    """The noisy ones of `denoising` steps, at the first `steps` training steps."""
    config = config_of(tmp_path, f"rollout.num_inference_steps={denoising}", *keys)
    method = FlowPolicyGradient(clip=(0.1, 0.1), kl_coef=0.0) if method is None else method
    settings = SimpleNamespace(num_inference_steps=denoising)
    runs = [SimpleNamespace(config=config, step=k, settings=settings, dit_method=method) for k in range(steps)]
    return [RewardTrainer._sde_indices(run) for run in runs]  # type: ignore[arg-type]


def test_a_progressive_window_moves_every_so_many_steps_and_starts_over(tmp_path):
    keys = ["rollout.sde_window_size=2", "rollout.sde_window_strategy=progressive", "rollout.sde_window_interval=3"]
    found = windows(tmp_path, *keys, steps=17)
    assert found == [(start, start + 1) for start in range(5) for _ in range(3)] + [(0, 1)] * 2
    inside = windows(tmp_path, *keys, "rollout.sde_window_range=[1, 4]", "rollout.sde_window_interval=1", steps=3)
    assert inside == [(1, 2), (2, 3), (1, 2)]


def test_a_random_window_lies_elsewhere_at_other_steps_and_seeds_and_is_everywhere_as_often(tmp_path):
    """200 windows of 2 of 6 steps: at each of five starts a fifth, within five standard deviations."""
    keys = ["rollout.sde_window_size=2", "rollout.sde_window_strategy=random"]
    found = windows(tmp_path, *keys, steps=200)
    assert found == windows(tmp_path, *keys, steps=200) != windows(tmp_path, *keys, "seed=4", steps=200)
    for start in range(5):
        assert found.count((start, start + 1)) == pytest.approx(40, abs=5 * (200 * 0.2 * 0.8) ** 0.5)


def test_without_a_window_all_steps_are_noisy_where_the_kernel_has_noise_and_none_where_nobody_asks(tmp_path):
    assert windows(tmp_path, steps=2) == [(0, 1, 2, 3, 4, 5)] * 2
    assert windows(tmp_path, "rollout.sde_kernel=cps", "rollout.eta=0.5", steps=1) == [(0, 1, 2, 3, 4)]
    assert windows(tmp_path, steps=1, method=object()) == [()]


def test_a_decaying_window_leaves_each_later_place_sooner(tmp_path):
    """At 13, 14, 15, 16 of 20 it stays 10 e^0, 10 e^-0.1, 10 e^-0.2, 10 e^-0.3 training steps, rounded."""
    keys = ["rollout.sde_window_size=1", "rollout.sde_window_range=[13, 17]", "rollout.sde_window_interval=10"]
    found = windows(tmp_path, *keys, "rollout.sde_window_strategy=decay", steps=36, denoising=20)
    assert found == [(13,)] * 10 + [(14,)] * 9 + [(15,)] * 8 + [(16,)] * 7 + [(13,)] * 2


def test_a_rollout_is_drawn_with_the_steps_window_and_the_runs_seed(tmp_path, monkeypatch):
    window = ["rollout.sde_window_size=2", "rollout.sde_window_strategy=progressive"]
    trainer = trainer_of(tmp_path, "rollout.num_inference_steps=6", *window)
    seen = []
    monkeypatch.setattr(reward_trainer, "draw_rollout", lambda *given, **named: seen.append((given, named)))
    trainer.step = 30  # the second place of a window that moves every 25 steps
    batch = Batch([0, 1], ["a", "b"], None, None)
    trainer.draw(batch, [5, 6], on_step=print)
    named = {"seed": 3, "sde_indices": (1, 2), "on_step": print, "sources": None}
    named |= {"meet": trainer.meet, "uses": trainer.residency.only}
    assert seen == [((trainer.family, batch, [5, 6], trainer.settings), named)]


def test_rates_are_of_what_all_processes_made(tmp_path, monkeypatch):
    """2 prompts of 4 pictures in 4 s are 2 pictures a second. 3 processes with 12 + 12 tokens each, drawn in 1 + 3 s,
    are 18 tokens a second."""
    monkeypatch.setattr(Clock, "total", lambda clock: 4.0)
    trainer = trainer_of(tmp_path, "model.component=ar", "rollout.plans_per_prompt=4", "rollout.renders_per_plan=1")
    pictures = trainer.training_step()["images_per_second"]
    assert (pictures, pictures.weight) == (2.0, 4.0)
    trainer.world = World(0, 3)
    plans = [SimpleNamespace(tokens=torch.zeros(2, 6)) for _ in range(2)]
    rollouts = [SimpleNamespace(plans=plan, plan_seconds=time) for plan, time in zip(plans, (1.0, 3.0), strict=True)]
    tokens = trainer._token_rate([SimpleNamespace(rollout=rollout) for rollout in rollouts])["tokens_per_second"]
    assert (tokens, tokens.weight) == (18.0, 4.0)
    assert trainer._token_rate([]) == {}, "plans that were not drawn have no rate"


def test_a_process_among_several_must_divide_what_it_draws_at_once(tmp_path):
    """Two prompts of 2 plans and 4 renders in two accumulation steps: 4 plans of one process, 2 of each of several."""
    keys = ["training.batch_size=1", "training.gradient_accumulation_steps=2"]
    for count, processes, told in (
        (2, 2, ""),
        (4, 1, ""),
        (4, 2, "updates_per_rollout 4 .* 2 ar samples"),
        (3, 1, "4 ar"),
    ):
        config = config_of(tmp_path, *keys, f"reward.grpo.updates_per_rollout={count}")
        with pytest.raises(SettingsError, match=told) if told else nullcontext():
            RewardTrainer.check_settings(config, World(0, processes))


def test_a_step_that_is_dropped_has_not_passed_the_gate(tmp_path, monkeypatch):
    keys = ["model.component=ar", "reward.grpo.num_samples=2", "training.batch_size=1"]
    trainer = trainer_of(tmp_path, *keys)
    trainer.step = 3

    def full(*_: object) -> dict[str, float]:
        assert trainer.gate.state() == {"passed_at": 3}
        raise ZeroDivisionError

    monkeypatch.setattr(updates, "update_ar", full)
    with pytest.raises(ZeroDivisionError):
        trainer.training_step()
    assert trainer.gate.state() == {"passed_at": None}
