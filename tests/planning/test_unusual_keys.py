"""Keys that make room or change what a step does, and what a plan makes of them; remedies as a user applies them."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from glm_training.cli import main as program
from glm_training.config import load_config
from glm_training.engine.families import build_family
from glm_training.engine.optimizers import build_optimizer
from glm_training.engine.sharding import guidance_bytes
from glm_training.engine.teachers import build_teachers
from glm_training.planning.counting import moment_bytes, teacher_bytes
from glm_training.planning.disk import checkpoints
from glm_training.planning.memory import Memory
from glm_training.planning.models import Networks, read_networks
from glm_training.planning.remedies import remedies
from glm_training.planning.run import BF16_MOMENTS, GUIDANCE, read_run
from glm_training.planning.schedule import schedule
from glm_training.utils.distributed import World
from tests import dmdr_runs
from tests.opd_runs import opd, write_experts
from tests.preference_runs import config_of as preference_config
from tests.runs import config_of

T2I, SDXL, DMDR = ("configs/t2i_training.yaml", "configs/sdxl_dpo_lora.yaml", "configs/sdxl_dmdr_cold_start.yaml")
WHOLE = ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false")
NARROW = ("optimizer.moments_dtype=bfloat16", "optimizer.dit.name=prodigy", "optimizer.dit.learning_rate=1")
AR, DIT = 8_914_788_352, 6_926_882_880
GIB = 1 << 30


@pytest.fixture(scope="module")
def networks() -> dict[str, Networks]:
    names = {"glm_image": "zai-org/GLM-Image", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
    return {family: read_networks(family, name) for family, name in names.items()}


def phases(networks, *overrides: str, gpus: int = 1) -> dict[str, dict[str, float]]:
    """The items of each phase of training both halves of GLM-Image whole, by name."""
    run = read_run(load_config([T2I], [*WHOLE, *overrides]), gpus=gpus)
    return {phase.name: phase.items for phase in Memory(run, networks["glm_image"]).phases()}


def test_moments_in_bf16_take_half(tmp_path):
    config = config_of(tmp_path, "training.optimizer=adamw", "optimizer.moments_dtype=bfloat16")
    (half, _), weight = read_run(config).halves, nn.Parameter(torch.ones(6, 5))
    assert half.rule == BF16_MOMENTS
    optimizer = build_optimizer(config.optimizer_for("ar"), {"w": weight}, {})
    weight.grad = torch.ones(6, 5)
    optimizer.step()
    kept = sum(value.numel() * value.element_size() for value in optimizer.state[weight].values() if value.dim())
    assert moment_bytes(half.rule, {"w": (6, 5)}) == kept


def test_halves_that_take_turns_are_not_there_together(networks):
    found = phases(networks, "training.offload_between_phases=true", "reward.grpo.kl_coef=0.1")
    for name, trained in {"rollout: plans": AR, "rollout: renders": DIT, "AR: optimizer step": AR}.items():
        assert found[name]["masters"] == found[name]["copies"] == 4 * trained
    assert "masters" not in found["rollout: decoding"]
    assert {name for name, items in found.items() if "moments" in items} == {
        "AR: forward and backward", "AR: optimizer step", "DiT: forward and backward", "DiT: optimizer step",
    }  # fmt: skip
    assert found["DiT: optimizer step"]["moments"] == 8 * DIT
    assert found["evaluation"]["masters"] == 4 * (AR + DIT)


def test_shards_that_wait_on_the_cpu_are_not_on_the_gpu(networks):
    shards = ("distributed.strategy=fsdp", "training.ema.decay=0.9", "reward.grpo.kl_coef=0.1")
    found = phases(networks, *shards, "distributed.offload=true", gpus=8)
    for name in ("masters", "moments", "copies", "gradients", "set aside", "optimizer's temporaries"):
        assert not any(name in items for items in found.values()), name
    assert (
        found["rollout: plans"]["gathered weights"] == 2 * AR
        and found["rollout: renders"]["gathered weights"] == 2 * DIT
    )
    here = phases(networks, *shards, gpus=8)
    assert here["evaluation"]["set aside"] == 4 * (AR + DIT) / 8, "weights, while their averages stand in"


def test_what_an_evaluation_draws_at_once_is_what_a_process_does(tmp_path):
    keys = ("evaluation.enabled=true", "evaluation.num_eval_samples=100")
    assert read_run(config_of(tmp_path, *keys)).evaluated == 32
    assert read_run(config_of(tmp_path, *keys), gpus=8).evaluated == 13, "its share"
    assert read_run(config_of(tmp_path, *keys, "evaluation.samples_per_prompt=3")).evaluated == 30


def test_on_policy_distillation_draws_as_many_as_reward_steps_and_decodes_none(networks, tmp_path):
    config = config_of(tmp_path, *opd(tmp_path))
    run = read_run(config)
    group = config.group()
    assert (run.plans, run.renders, run.noisy) == (group.plans, group.renders, 3)
    assert schedule(config, run).images == 2 * group.size
    names = [phase.name for phase in Memory(run, networks["glm_image"]).phases()]
    assert "rollout: renders" in names and "rollout: decoding" not in names


@pytest.mark.parametrize("lora", ["true", "false"], ids=["adapters", "whole"])
def test_teachers_keep_what_a_plan_says(tmp_path, lora):
    write_experts(tmp_path)
    config = config_of(tmp_path, *opd(tmp_path), f"lora.enabled={lora}", "lora.rank=2", "lora.alpha=4")
    teachers = build_teachers(config, build_family(config, World()), World())
    run = read_run(config)
    assert run.teachers == ("adapters", "model")
    memory = Memory(run, read_networks("glm_image", "tiny-random"))
    assert all(phase.items["teachers"] == memory.phases()[0].items["teachers"] for phase in memory.phases())
    planned, kept = 0.0, dict.fromkeys(teachers, 0)
    for part in config.parts():
        for name, kind in zip(("first", "second"), run.teachers, strict=True):
            values = teachers[name][part].args[1].state_dict().values()
            kept[name] += sum(value.numel() * value.element_size() for value in values)
            own = teacher_bytes(replace(run, teachers=(kind,)), memory.by_name[part])
            planned += own
            if kind == "adapters" or lora == "false":
                assert own == sum(value.numel() * value.element_size() for value in values)
    assert memory.phases()[0].items["teachers"] == planned >= sum(kept.values())


def test_auto_counts_the_guidance_network_as_a_run_does(tmp_path):
    config = dmdr_runs.config_of(tmp_path, "model.component=dit", family="glm_image")
    memory = Memory(read_run(config), read_networks("glm_image", "tiny-random"))
    loaded = [part for part in memory.parts if part.name != GUIDANCE]
    own = memory.resident() - sum(memory._frozen_bytes(part) + 16 * part.trained_count for part in loaded)
    assert own == guidance_bytes(config, build_family(config, World()))


def test_supervised_steps_between_those_with_rewards_hold_the_gradients_of_both(networks):
    found = phases(networks, "training.reward_frequency=2")
    assert found["SFT DiT: optimizer step"]["gradients"] == 4 * (AR + DIT)
    assert found["DiT: optimizer step"]["gradients"] == 4 * DIT


def test_encoders_of_pictures_that_are_cut_anew_do_not_sleep(networks, tmp_path):
    def asleep(*keys: str) -> set[str]:
        memory = Memory(read_run(preference_config(tmp_path, "sdxl", *keys)), networks["sdxl"])
        return {part.name for part in memory.parts if part.sleeps}

    assert asleep() == {"vae", "text_encoder", "text_encoder_2"}
    assert asleep("dpo.crop=random") == {"text_encoder", "text_encoder_2"}


def test_the_vae_that_overflows_in_fp16_is_in_fp32(networks):
    """SDXL's: weights and activations of twice the bytes that they have in bf16, but for the picture, fp32 in both."""

    def plan(dtype: str) -> tuple[Memory, dict[str, float], float]:
        config = load_config([SDXL], ["checkpoint.save_lora_only=false", f"model.torch_dtype={dtype}"])
        memory = Memory(read_run(config), networks["sdxl"])
        return memory, memory.state(awake=True), checkpoints(config, memory).items["pipeline"]

    (half, wide), vae = (plan(dtype) for dtype in ("bfloat16", "float16")), 83_653_863
    assert wide[1]["weights"] - half[1]["weights"] == wide[2] - half[2] == 2 * vae
    picture = 3 * 4 * 1024 * 1024
    assert wide[0]._decoding(1) - picture == 2 * (half[0]._decoding(1) - picture)


def test_a_moving_reference_is_in_the_checkpoint(networks):
    def slow(*keys: str) -> float:
        config = load_config([T2I], [*WHOLE, "reward.grpo.kl_coef=0.1", *keys])
        return checkpoints(config, Memory(read_run(config), networks["glm_image"])).items.get("slow copies", 0.0)

    assert slow() == 0 and slow("reward.grpo.reference=ema") == 4 * (AR + DIT)


@pytest.mark.parametrize(
    "file, overrides, gpus, family, without",
    [
        (T2I, [*WHOLE, "optimizer.ar.name=adamw", "lora.dit.enabled=false"], 1, "glm_image", ()),
        (T2I, [*WHOLE, *NARROW], 2, "glm_image", ("distributed.", "training.optimizer")),
        (DMDR, [], 2, "sdxl", ("model.quantization", "rollout.vae", "cache.")),
        (SDXL, ["checkpoint.save_lora_only=false"], 1, "sdxl", ("model.quantization", "training.offload")),
    ],
)  # fmt: skip
def test_remedies_can_all_be_taken_and_save_what_they_say(networks, file, overrides, gpus, family, without):
    config = load_config([file], overrides)
    memory_of = partial(Memory, networks=networks[family])
    found = remedies(config, read_run(config, gpus=gpus), memory_of, GIB)
    words = [word for each in found for word in each.change.split()]
    assert words and not any(word.startswith(without) for word in words)
    again = load_config([file], [*overrides, *words])
    assert memory_of(read_run(again, gpus=gpus)).peak().total == pytest.approx(found[-1].peak)


@pytest.mark.parametrize("gpus, updates, batch_size", [(1, 4, 1), (2, 1, 1), (2, 4, 2), (2, 16, None)])
def test_a_smaller_batch_divides_into_the_updates_on_it(networks, gpus, updates, batch_size):
    """Eight prompts of two plans: a process among several has rows for all updates in each batch, one process in what
    it accumulates. `batch_size`: the one that is advised, None where none is."""
    keys = ["training.batch_size=8", "training.gradient_accumulation_steps=1"]
    keys += ["rollout.micro_batch_size=null", "rollout.vae_batch_size=null"]
    config = load_config([T2I], [*keys, f"reward.grpo.updates_per_rollout={updates}"])
    found = remedies(config, read_run(config, gpus=gpus), partial(Memory, networks=networks["glm_image"]), GIB)
    words = [word for each in found for word in each.change.split() if word.startswith("training.batch_size=")]
    assert words == ([] if batch_size is None else [f"training.batch_size={batch_size}"])


@pytest.mark.parametrize(
    "words, told",
    [
        (("--gpus", "3", "--strategy", "fsdp", "--shards", "2"), "does not divide the 3 processes"),
        (("--gpus", "2", "training.optimizer=adafactor", "distributed.strategy=fsdp"), "the optimizer adafactor of"),
        (("--gpus", "2", "training.offload_between_phases=true"), "for one process, and there are 2"),
        (("--gpus", "2", "training.batch_size=3", "reward.grpo.updates_per_rollout=4"), "divide the 6 ar samples"),
    ],
)
def test_what_no_run_could_follow_is_not_planned(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["glm-train", "plan", T2I, *words])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 2 and told in " ".join(capsys.readouterr().err.split())
