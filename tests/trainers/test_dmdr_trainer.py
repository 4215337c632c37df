"""DMDR on the random tiny SDXL and GLM-Image: who is updated when, with what, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import save_file

from examples.random_scorers import write_scorers
from glm_training.checkpoint.resume import load_checkpoint
from glm_training.config import load_config
from glm_training.engine.errors import SettingsError
from glm_training.engine.parts import Part
from glm_training.models.lora import adapters_disabled
from glm_training.models.sdxl.family import SDXL
from glm_training.trainers.dmdr_trainer import GUIDANCE
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world
from glm_training.utils.randomness import normal
from tests.dmdr_runs import random_scorers, stepped, trainer_of
from tests.runs import PROMPTS, weights_of
from tests.same import assert_identical

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> list[str]:
    return random_scorers(tmp_path_factory.mktemp("scorers"))


def moved(before: dict[str, object], after: dict[str, object]) -> float:
    """The share of weights that changed at all."""
    return mean(float(not torch.equal(before[name], after[name])) for name in before)


# -- who is updated ----------------------------------------------------------------------------------------------------


def test_five_updates_of_the_guidance_network_for_one_of_the_generator(tmp_path, monkeypatch):
    updates = []
    step = Part.step
    monkeypatch.setattr(Part, "step", lambda part, at: updates.append((part.name, at)) or step(part, at))
    trainer_of(tmp_path, "dmdr.update_ratio=5", "training.max_steps=10").train()
    assert [at for name, at in updates if name == GUIDANCE] == list(range(10))
    assert [at for name, at in updates if name == "unet"] == [4, 9]


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
@pytest.mark.parametrize("lora", ["false", "true"])
def test_both_networks_learn_and_the_teacher_stays_bit_for_bit(tmp_path, family, lora):
    trainer = trainer_of(tmp_path, f"lora.enabled={lora}", "model.torch_dtype=bfloat16", family=family)
    name = trainer.name
    before, teacher = weights_of(trainer), {k: v.detach().clone() for k, v in trainer.teacher.named_parameters()}
    fresh = trainer_of(tmp_path, "model.torch_dtype=bfloat16", family=family).teacher
    after = stepped(trainer, 4)
    assert moved(before[GUIDANCE], after[GUIDANCE]) > 0.9 and moved(before[name], after[name]) > 0.9
    frozen = {key: value for key, value in trainer.teacher.named_parameters() if "lora_" not in key}
    assert_identical({key: teacher[key] for key in frozen}, {k: v.detach() for k, v in frozen.items()})
    assert_identical({k: dict(fresh.named_parameters())[k].detach() for k in frozen}, {k: teacher[k] for k in frozen})
    assert all(value.dtype == torch.bfloat16 and not value.requires_grad for value in frozen.values())
    assert {value.dtype for value in trainer.parts[name].parameters.values()} == {torch.float32}
    assert all("lora_" in key for key in after[GUIDANCE])
    assert all(("lora_" in key) == (lora == "true") for key in after[name])


def test_the_real_score_is_the_model_as_it_was_loaded(tmp_path):
    """Also where the generator started from other weights, or carries an adapter."""
    stock = SDXL.load("tiny-random", seed=3)
    save_file({k: v + 0.1 for k, v in stock.unet.unet.state_dict().items()}, tmp_path / "start.safetensors")
    weights = f"dmdr.initial_weights={tmp_path / 'start.safetensors'}"
    trainer = trainer_of(tmp_path, "lora.enabled=true", weights)
    stepped(trainer)
    generator = torch.Generator().manual_seed(0)
    latents, levels = (
        torch.randn(2, 4, 8, 8, generator=generator),
        trainer.scores.denoiser.levels(torch.tensor([0.3, 0.9])),
    )
    condition = trainer.conditions.of(PROMPTS[:2], [0, 1], [0, 0])
    real = trainer.scores.real(latents, levels, condition, 0.0)
    denoiser = stock.denoiser(64, 64)
    with torch.no_grad():
        predicted = denoiser.predict(stock.unet, latents, levels, condition, guidance_scale=7.0)
    torch.testing.assert_close(real, denoiser.clean(predicted, latents, levels))
    with adapters_disabled(trainer.teacher):
        assert not torch.equal(real, trainer.scores.fake(latents, levels, condition))
    generator_base = trainer.family.unet.unet.conv_in.weight
    torch.testing.assert_close(generator_base, stock.unet.unet.conv_in.weight + 0.1)


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_gradient_checkpointing_and_chunks_change_nothing(tmp_path, family):
    """Also with an adapter at half its strength, which blocks that run again in the backward pass must find so."""
    found = []
    chunked = [
        "training.batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.gradient_checkpointing=true",
    ]
    for keys in ([], chunked):
        shared = ["training.optimizer=sgd", "training.adam_beta1=0", "training.max_grad_norm=0", "dmdr.fake_scale=0.5"]
        trainer = trainer_of(tmp_path, *shared, "training.learning_rate=0.1", *keys, family=family)
        for name, param in trainer.guidance.parameters.items():
            param.data.copy_(normal(0, name, [(0,)], tuple(param.shape))[0] / 4)
        found.append((weights_of(trainer), stepped(trainer)))
    (before, plain), (_, other) = found
    for part, weights in plain.items():
        change = max((before[part][name] - value).abs().max() for name, value in weights.items())
        error = max((other[part][name] - value).abs().max() for name, value in weights.items())
        assert change > 1e-4 and error < 1e-3 * change, (part, change, error)


def test_every_weight_learns_under_autocast(tmp_path):
    """Weights that autocast has cast for the simulation, which has no gradient, are not the ones trained on."""
    trainer = trainer_of(tmp_path, "training.mixed_precision=bf16", "dmdr.update_ratio=1")
    before = weights_of(trainer)
    after = stepped(trainer, 2)
    assert moved(before["unet"], after["unet"]) > 0.95 and moved(before[GUIDANCE], after[GUIDANCE]) > 0.95


# -- one step ----------------------------------------------------------------------------------------------------------

ONE_STEP = ["dmdr.student_steps=1", "dmdr.one_step_timestep=399", "evaluation.num_inference_steps=1"]


def test_a_one_step_generator_gets_pure_noise_told_as_399_from_the_given_weights(tmp_path, monkeypatch):
    stock = SDXL.load("tiny-random", seed=3).unet.unet.state_dict()
    torch.save({name: value * 1.5 for name, value in stock.items()}, tmp_path / "start.bin")
    trainer = trainer_of(tmp_path, *ONE_STEP, f"dmdr.initial_weights={tmp_path / 'start.bin'}")
    assert torch.equal(trainer.family.unet.unet.conv_in.weight, stock["conv_in.weight"] * 1.5)
    assert torch.equal(trainer.teacher.conv_in.weight, stock["conv_in.weight"])
    seen = []
    trainer.generator.component.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[1])))
    positions = [trainer.sampler.position + row for row in range(2)]
    noise = trainer._draws(positions).start
    trainer.training_step()
    ((latents, timesteps),) = seen
    assert torch.equal(latents, noise[:, 0]) and timesteps.tolist() == [399, 399]
    assert abs(float(latents.std()) - 1) < 0.1


def test_a_one_step_generator_draws_as_it_is_trained(tmp_path):
    trainer = trainer_of(tmp_path, *ONE_STEP)
    component, seen = trainer.generator.component, []
    component.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    condition = trainer.conditions.of(PROMPTS[:2], [0, 1], [0, 0])
    noise = trainer._draws([0, 1]).start[:, 0]
    drawn = component.sample(noise, condition.text, condition.time_ids, steps=1, guidance_scale=1.0)
    with torch.no_grad():
        trained = trainer.simulation.generate(component, noise, torch.zeros(2, dtype=torch.long), condition)
    torch.testing.assert_close(drawn, trained, rtol=1e-4, atol=1e-4)
    assert [float(value) for timesteps in seen for value in timesteps] == [399] * 4


def test_initial_weights_keep_bits_that_the_teacher_has_no_room_for(tmp_path):
    stock = SDXL.load("tiny-random", seed=3).unet.unet.state_dict()
    torch.save({name: value * 1.5 for name, value in stock.items()}, tmp_path / "start.bin")
    given = [f"dmdr.initial_weights={tmp_path / 'start.bin'}", "model.torch_dtype=bfloat16"]
    trainer = trainer_of(tmp_path, *ONE_STEP, *given)
    assert trainer.teacher.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(trainer.family.unet.unet.conv_in.weight, stock["conv_in.weight"] * 1.5)


def test_wrong_initial_weights_are_named(tmp_path):
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "start.bin")
    with pytest.raises(SettingsError, match="dmdr.initial_weights: .*do not fit the UNet2DConditionModel"):
        trainer_of(tmp_path, f"dmdr.initial_weights={tmp_path / 'start.bin'}")


# -- dynamic strategies ------------------------------------------------------------------------------------------------


def test_both_strategies_follow_the_cold_start_and_reach_the_losses(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "dmdr.real_scale=0.5", "dmdr.dynamic_steps=2000", "dmdr.renoise_range=[0,1]")
    scales = [trainer.dynamics.real_scale(step) for step in (0, 1000, 2000, 3000)]
    assert scales == pytest.approx([0.5, 0.25, 0, 0], abs=1e-12)
    draws = (torch.arange(4000) + 0.5) / 4000
    means = [trainer.dynamics.levels(draws, step).mean().item() for step in (0, 2000)]
    assert means == pytest.approx([4 / 5.5, 0.5], abs=1e-3)
    used = []
    real = type(trainer.scores).real

    def spy(scores, noisy, levels, condition, scale):
        used.append((scale, levels.timestep))
        return real(scores, noisy, levels, condition, scale)

    monkeypatch.setattr(type(trainer.scores), "real", spy)
    for step in (1, 999, 1999):
        trainer.step = step
        trainer.training_step()
    assert [scale for scale, _ in used] == [trainer.dynamics.real_scale(step) for step in (1, 999, 1999)]


def test_switched_off_they_are_at_their_ends(tmp_path):
    trainer = trainer_of(tmp_path, "dmdr.dynamic_guidance=false", "dmdr.dynamic_renoise=false")
    draws = torch.linspace(0, 1, 101)
    assert trainer.dynamics.real_scale(0) == 0.0
    torch.testing.assert_close(trainer.dynamics.levels(draws, 0), 0.02 + 0.96 * draws)


def test_noise_levels_of_a_discrete_schedule_cover_it(tmp_path):
    """A level in [0, 1] is not taken for a timestep in 0..999."""
    trainer = trainer_of(tmp_path, "dmdr.dynamic_renoise=false")
    u = torch.cat([trainer.dynamics.levels(trainer._draws([row]).guidance[1], 0) for row in range(400)])
    timesteps = trainer.scores.denoiser.levels(u).timestep
    assert timesteps.dtype == torch.int64 and timesteps.min() < 60 and timesteps.max() > 940
    assert abs(timesteps.float().mean() - 500) < 50 and timesteps.min() >= 20 and timesteps.max() <= 980


def test_draws_depend_on_the_place_in_the_run_alone(tmp_path):
    trainer = trainer_of(tmp_path)
    pair, alone = trainer._draws([6, 7]), trainer._draws([7])
    assert_identical([pair.start[1:], pair.pick[1:]], [alone.start, alone.pick])
    assert torch.equal(pair.generator[0][1:], alone.generator[0]) and torch.equal(
        pair.guidance[1][1:], alone.guidance[1]
    )
    assert not torch.equal(pair.guidance[0], pair.generator[0])


# -- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["refl", "srpo"])
def test_rewards_reach_the_generator_when_the_cold_start_ends(tmp_path, scorers, reward):
    """Up to then the run is the one without rewards, bit for bit."""
    shared = ["training.optimizer=sgd", "dmdr.update_ratio=1", "dmdr.dynamic_steps=4"]
    plain = trainer_of(tmp_path, *shared)
    trained = trainer_of(tmp_path, *shared, *scorers, "dmdr.cold_start_steps=2", f"dmdr.reward.method={reward}")
    assert_identical(stepped(plain), stepped(trained))
    figures = trained.training_step()
    without = stepped(plain, 1)
    assert {"unet/score_clip_h", "unet/score_hps_v2"} <= figures.keys() and figures["unet/reward_loss"] > 0
    with_rewards = weights_of(trained)
    assert moved(without["unet"], with_rewards["unet"]) > 0.5
    assert_identical(without[GUIDANCE], with_rewards[GUIDANCE])


def test_the_reward_has_a_gradient_through_the_decoder(tmp_path, scorers):
    trainer = trainer_of(tmp_path, *scorers, "dmdr.dynamic_steps=4")
    generated = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss, _ = trainer.reward_loss(generated, PROMPTS[:2])
    loss.backward()
    assert (generated.grad.abs().flatten(1).sum(1) > 0).all()
    better = (generated - 50 * generated.grad).detach()
    assert trainer.reward_loss(better, PROMPTS[:2])[0] < loss


def test_glm_images_are_scored_through_its_vae(tmp_path, scorers):
    trainer = trainer_of(tmp_path, *scorers, "dmdr.reward.decoder=vae", family="glm_image")
    trainer.step = 1
    assert trainer.training_step()["dit/reward_loss"] > 0


def test_a_run_that_ends_before_rewards_count_loads_no_scorers(tmp_path):
    assert trainer_of(tmp_path, "dmdr.cold_start_steps=4").scorers is None


# -- what a run leaves -------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_the_documented_tree_lies_over_the_run(tmp_path, family):
    keys = ["lora.enabled=true", "logging.save_interval=1", "checkpoint.save_total_limit=2", "logging.log_images=true"]
    trainer = trainer_of(tmp_path, *keys, family=family)
    trainer.train()
    run = tmp_path / "run"
    checkpoints, name = run / "checkpoints", trainer.name
    for folder, inside in {"accelerator_1": "", "accelerator_2": "", "lora_gui": "lora_guidance"}.items():
        assert [path.name for path in sorted((checkpoints / folder).iterdir())] == ["step-000003", "step-000004"]
        assert (checkpoints / folder / "step-000004").resolve() == (checkpoints / "step-000004" / inside).resolve()
    assert (checkpoints / "lora_gen" / "step-000004").resolve() == (checkpoints / f"step-000004/lora_{name}").resolve()
    assert any((checkpoints / "lora_gui" / "step-000004").iterdir())
    assert (checkpoints / "torch_units" / "step-000004.pt" / "manifest.json").is_file()
    assert json.loads((run / "args.json").read_text())["dmdr"]["guidance_rank"] == 2
    assert (run / "log.txt").read_text() == (run / "train.log").read_text() != ""
    assert (run / "samples" / "step-000004" / "0.png").is_file()
    assert [line["step"] for line in lines(run / "loss_logs" / "loss_gui_log.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(run / "loss_logs" / "loss_gen_log.jsonl")] == [2, 4]
    assert all(math.isfinite(line["fake_loss"]) for line in lines(run / "loss_logs" / "loss_gui_log.jsonl"))
    shutil.move(run, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/checkpoints/torch_units/step-000004.pt/manifest.json").is_file()


@pytest.mark.parametrize("lora", ["false", "true"])
@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_four_steps_equal_two_and_a_resume_bit_for_bit(tmp_path, family, lora):
    keys = [f"lora.enabled={lora}", "logging.save_interval=2"]
    trainer_of(tmp_path, *keys, f"output_dir={tmp_path}/whole", family=family).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
    link = "checkpoint.resume_from=" + str(tmp_path / "run/checkpoints/torch_units/step-000002.pt")
    resumed = trainer_of(tmp_path, *keys, link, family=family)
    resumed.train()
    left, right = (load_checkpoint(tmp_path / run / "checkpoints/step-000004") for run in ("whole", "run"))
    assert_identical(left, right)
    for log in ("loss_gen_log", "loss_gui_log"):
        left, right = (lines(tmp_path / run / "loss_logs" / f"{log}.jsonl") for run in ("whole", "run"))
        assert left == right, "no line twice, none lost"
    owned = json.loads((tmp_path / "run/checkpoints/ledger.json").read_text())["made_by_this_run"]
    assert "step-000002" in [entry["name"] for entry in owned], "a link leads to the run's own checkpoint"


def test_the_second_stage_goes_on_with_both_optimizers(tmp_path, scorers):
    """At the step where the first one ended, with its own rate, decay, betas and epsilon, in a directory of its own."""
    trainer_of(tmp_path, f"output_dir={tmp_path}/first").train()
    accepted = "[training, dmdr.cold_start_steps, dmdr.reward, reward.options]"
    second = trainer_of(
        tmp_path,
        *scorers,
        "dmdr.cold_start_steps=4",
        "dmdr.dynamic_steps=null",
        "training.max_steps=6",
        "training.learning_rate=1e-4",
        "training.weight_decay=0.25",
        "training.adam_beta1=0.5",
        "training.adam_beta2=0.75",
        "training.adam_epsilon=1e-6",
        f"checkpoint.resume_from={tmp_path}/first/checkpoints/torch_units/step-000004.pt",
        f"resume.accept={accepted}",
    )
    second.train()
    wanted = {"lr": 1e-4, "betas": (0.5, 0.75), "eps": 1e-6}
    for part in second.parts.values():
        for group in part.optimizer.param_groups:
            assert {key: group[key] for key in wanted} == wanted, part.name
        assert {group["weight_decay"] for group in part.optimizer.param_groups} <= {0.25, 0.0}
        assert 0.25 in {group["weight_decay"] for group in part.optimizer.param_groups}, part.name
    saved = load_checkpoint(tmp_path / "first/checkpoints/step-000004")
    after = load_checkpoint(tmp_path / "run/checkpoints/step-000006")
    counts = {name: _adam_steps(state) for name, state in (("first", saved), ("second", after))}
    assert counts == {"first": {"unet": 2, GUIDANCE: 4}, "second": {"unet": 3, GUIDANCE: 6}}
    (line,) = lines(tmp_path / "run/loss_logs/loss_gen_log.jsonl")
    assert line["step"] == 6 and line["learning_rate"] == 1e-4 and "reward_loss" in line
    assert [line["step"] for line in lines(tmp_path / "run/loss_logs/loss_gui_log.jsonl")] == [5, 6]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints/accelerator_1").iterdir()) == ["step-000006"]


def _adam_steps(state) -> dict[str, int]:
    found = {}
    for part in ("unet", GUIDANCE):
        found[part] = int(max(entry["step"] for entry in state[f"{part}_optimizer"]["state"].values()))
    return found


def test_a_torn_line_leaves_the_loss_log(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.outputs.write_losses("gui", 1, {"fake_loss": math.nan})
    path = trainer.outputs.loss_log("gui")
    path.write_text(path.read_text() + '{"step": 2, "fake', encoding="utf-8")
    trainer.outputs.open(1)
    assert lines(path) == [{"step": 1, "fake_loss": None}]


# -- the shipped files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the repository's prompts and the scorers where the small configurations look for them."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "data" / "t2i", folder / "data" / "t2i")
    write_scorers(folder / "runs" / "random_scorers")
    return folder


def test_the_two_stages_of_the_small_files_run_one_after_the_other(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for name, last in (("sdxl_dmdr_cold_start_tiny", 10), ("sdxl_dmdr_refl_tiny", 20)):
        assert build_trainer(load_config(ROOT / f"configs/{name}.yaml"), init_world(True, None)).train().step == last
    assert (workplace / "runs/sdxl_dmdr_refl_tiny/samples/step-000020/0.png").is_file()


@pytest.mark.parametrize("name", ["sdxl_dmdr_4step_tiny", "glm_dit_distill_tiny"])
def test_the_other_small_files_run(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    config = load_config(ROOT / f"configs/{name}.yaml", ["evaluation.num_eval_samples=2", "training.batch_size=2"])
    assert build_trainer(config, init_world(True, None)).train().step == config.training.max_steps


def test_the_full_size_files_say_what_the_small_ones_do():
    """The same method with the same parts switched on; the published 3,000 and 4,000 generator updates in one step."""
    for small in sorted((ROOT / "configs").glob("*_tiny.yaml")):
        if "dmdr" not in small.name and "distill" not in small.name:
            continue
        full, tiny = load_config(small.with_name(small.name.replace("_tiny", ""))), load_config(small)
        for key in ("student_steps", "one_step_timestep", "update_ratio", "dynamic_guidance", "dynamic_renoise"):
            assert getattr(full.dmdr, key) == getattr(tiny.dmdr, key), (small.name, key)
        assert (full.dmdr.cold_start_steps is None) == (tiny.dmdr.cold_start_steps is None)
    first, second = (load_config(ROOT / f"configs/sdxl_dmdr_{name}.yaml") for name in ("cold_start", "refl"))
    assert (first.training.max_steps, second.training.max_steps, second.dmdr.cold_start_steps) == (15000, 20000, 15000)
    assert (first.training.learning_rate, second.training.learning_rate) == (1e-7, 5e-8)
