"""The items of a phase against what the program itself holds, and how they are shared out over GPUs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from glm_training.config import load_config
from glm_training.data import Batch
from glm_training.engine import setup
from glm_training.models.glm_image.decode import DecoderLayer, Rotary
from glm_training.models.glm_image.family import GLMImage
from glm_training.planning.counting import ar_sizes
from glm_training.planning.memory import Memory
from glm_training.planning.models import Networks, read_networks
from glm_training.planning.passes import kv_cache
from glm_training.planning.remedies import remedies
from glm_training.planning.run import Run, read_run
from glm_training.planning.schedule import schedule
from glm_training.reinforcement.rollout import draw_rollout, rollout_settings
from glm_training.utils.distributed import World
from tests.runs import PROMPTS, config_of

GIB = 1 << 30


@pytest.fixture(scope="module")
def networks() -> Networks:
    return read_networks("glm_image", "zai-org/GLM-Image")


@pytest.fixture(scope="module")
def run() -> Run:
    return read_run(load_config(["configs/t2i_training.yaml"], []))


def whole(run: Run) -> Run:
    return replace(run, halves=tuple(replace(h, lora=replace(h.lora, enabled=False), copies=()) for h in run.halves))


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("means", [False, True])
def test_rollout_store_is_what_a_rollout_holds(tmp_path, means):
    changes = ["reward.grpo.num_samples=4", "rollout.sde_window_size=2", "training.gradient_accumulation_steps=1"]
    changes += ["model.ar.top_p=0.5", *(["reward.grpo.dit.divergence_threshold=1e-4"] if means else [])]
    config = config_of(tmp_path, *changes)
    family = GLMImage.load("tiny-random")
    settings = rollout_settings(config)
    batch = Batch(prompts=["one", "two"], indices=[0, 1], targets=None, sources=None)
    with torch.no_grad():
        rollout = draw_rollout(family, batch, [0, 1], settings, seed=1, sde_indices=(0, 1))
    renders, plans = rollout.renders, rollout.plans
    held = tensor_bytes(renders.stored, renders.final, renders.means, renders.condition.glyph)
    held += tensor_bytes(plans.tokens, plans.log_probs, plans.support)
    run = replace(read_run(config), glyph_tokens=renders.condition.glyph.shape[1])
    worked_out = Memory(run, read_networks("glm_image", "tiny-random")).rollout_store()["rollout store"]
    assert worked_out == held
    assert rollout.images.numel() * 4 == 3 * 4 * 64 * 64 * run.batch_size * run.group


def test_the_cache_is_as_large_as_the_layers_make_it():
    model: Any = GLMImage.load("tiny-random").ar.model
    language = model.model.language_model
    layers = [DecoderLayer(layer) for layer in language.layers]
    hidden = torch.zeros(1, 7, language.config.hidden_size)
    rotary = Rotary.of(language, hidden, torch.arange(7).expand(3, 1, 7))
    with torch.no_grad():
        for layer in layers:
            layer.read_prompts(hidden, rotary, None, 3, 20)
    held = sum(tensor_bytes(layer.keys, layer.values) for layer in layers)
    assert kv_cache(ar_sizes(model), 3, 20, 4) == held


def test_what_is_trained_whole_takes_twenty_bytes_at_the_step_of_adamw(networks, run):
    memory = Memory(replace(whole(run), metrics=()), networks)
    trained = 6_926_882_880 + 8_914_788_352
    state = memory.state(awake=False)
    assert state["masters"] == 4 * trained and state["moments"] == 8 * trained
    step = next(phase for phase in memory.phases() if phase.name == "AR: optimizer step")
    assert step.items["gradients"] == step.items["optimizer's temporaries"] == 4 * 8_914_788_352


def test_ddp_adds_buckets_and_fsdp_divides(networks, run):
    one = Memory(whole(run), networks)
    ddp = Memory(replace(whole(run), gpus=8, strategy="ddp"), networks)
    fsdp = Memory(replace(whole(run), gpus=8, strategy="fsdp", shards=8), networks)
    assert ddp.state(awake=False) == one.state(awake=False)
    assert ddp.gradients(["dit"])["gradient buckets"] == 4 * 6_926_882_880
    for item in ("masters", "moments"):
        assert fsdp.state(awake=False)[item] == one.state(awake=False)[item] / 8
    assert fsdp.gradients(["dit"])["gradients"] == one.gradients(["dit"])["gradients"] / 8
    assert fsdp.gradients(["dit"])["gradient buckets"] < 2 * GIB, "a block's, whole"
    assert fsdp.peak().total < 80 * GIB < ddp.peak().total
    replicas = Memory(replace(whole(run), gpus=8, strategy="fsdp", shards=4), networks)
    assert replicas.state(awake=False)["masters"] == one.state(awake=False)["masters"] / 4


# of the DiT: q, k, v, o, two layers of the feed-forward at four times the width, 12 shifts and gates, all with biases
DIT_BLOCK = 4 * (4096**2 + 4096) + 2 * 4 * 4096**2 + 5 * 4096 + 12 * 4096 * (512 + 1)
DIT = 6_926_882_880


@pytest.mark.parametrize("shards", [8, 2])
@pytest.mark.parametrize("low, given", [(2, 2), (None, 4)])
def test_shards_hold_a_block_whole_on_its_way(networks, run, low, given, shards):
    memory = Memory(replace(whole(run), gpus=8, strategy="fsdp", shards=shards, low=low), networks)
    part = memory.by_name["dit"]
    assert (part.unit, part.rest) == (DIT_BLOCK, DIT - 30 * DIT_BLOCK)
    # as the backward pass gives its gradient, and in fp32; and shards on their way to the other replicas
    sent = 4 * DIT / shards if shards < 8 else 0
    assert memory.gradients(["dit"])["gradient buckets"] == (given + 4) * DIT_BLOCK + sent
    assert memory.dit.weights == DIT - 28 * DIT_BLOCK, "two blocks, and what lies in none"


def test_a_half_in_shards_is_whole_while_it_draws(networks, run):
    one = {each.name: each.items for each in Memory(whole(run), networks).phases()}
    memory = Memory(replace(whole(run), gpus=8, strategy="fsdp", shards=8), networks)
    gathered = memory.state(awake=False)["gathered weights"]
    found = {each.name: each.items for each in memory.phases()}
    for name, weights in {"rollout: plans": 8_914_788_352, "rollout: renders": DIT}.items():
        assert found[name]["gathered weights"] == gathered + 2 * weights, "in bf16"
    # where nothing is in shards the casts of the DiT's fp32 weights are as large
    assert found["rollout: renders"]["activations"] == one["rollout: renders"]["activations"] - 2 * DIT


def test_a_half_that_draws_block_by_block_takes_what_its_passes_do(networks, run):
    one = {each.name: each.items for each in Memory(whole(run), networks).phases()}
    memory = Memory(replace(whole(run), gpus=8, strategy="fsdp", shards=8, by_block=("ar", "dit")), networks)
    gathered = memory.state(awake=False)["gathered weights"]
    found = {each.name: each.items for each in memory.phases()}
    for name in ("rollout: plans", "rollout: renders"):
        assert found[name].get("gathered weights", 0.0) == gathered
    # casts: of the whole DiT's fp32 weights there, here of two blocks and of what lies in none
    casts = one["rollout: renders"]["activations"] - found["rollout: renders"]["activations"]
    assert casts == 2 * 28 * DIT_BLOCK


def test_a_frozen_base_in_shards_is_gathered_by_two_blocks(networks, run):
    alone = replace(run, component="dit", halves=run.halves[1:], method="supervised")
    memory = Memory(replace(alone, gpus=8, strategy="fsdp", shards=8), networks)
    frozen = sum(2 * part.total for part in memory.parts if part.name != "dit" and not part.sleeps)
    wanted = frozen + 2 * DIT / 8 + 2 * (DIT - 28 * DIT_BLOCK)
    lying = memory.state(awake=False)
    assert lying["weights"] + lying["gathered weights"] == pytest.approx(wanted)


@pytest.mark.parametrize("kind, bits", [("int8", 8.0), ("nf4", 4.127)])
def test_quantization_reaches_the_linear_layers_of_the_blocks(networks, run, kind, bits):
    plain, small = Memory(run, networks), Memory(replace(run, quantization=kind), networks)
    saved = plain.state(awake=False)["weights"] - small.state(awake=False)["weights"]
    # of the DiT's blocks: q, k, v, o, two of the feed-forward at four times the width, and 12 x 512 of modulation
    dit = 30 * (4 * 4096**2 + 2 * 4 * 4096**2 + 12 * 4096 * 512)
    ar = 40 * (2 * 4096**2 + 2 * 4096 * 256 + 3 * 4096 * 13_696)
    assert saved == pytest.approx((dit + ar) * (16 - bits) / 8, rel=1e-9)


def test_copies_of_references_and_averages_are_counted(tmp_path):
    def copies(*changes: str) -> tuple[str, ...]:
        return read_run(config_of(tmp_path, *changes)).halves[-1].copies

    assert copies("reward.grpo.kl_coef=0.1") == ("reference",)
    adapters = ("lora.enabled=true", "reward.grpo.kl_coef=0.1")
    assert copies(*adapters) == (), "the model with its adapters off"
    assert copies(*adapters, "reward.grpo.reference=ema") == ("moving reference",)
    assert copies("training.ema.decay=0.9", "reward.grpo.kl_coef=0") == ("average",)


def test_encoders_sleep_in_steps_and_are_awake_in_evaluations(networks, run):
    memory = Memory(run, networks)
    asleep = {part.name: 2 * part.total for part in memory.parts if part.sleeps}
    assert asleep.keys() == {"vision tower and VQ model", "text_encoder"}
    awake = memory.state(awake=True)["weights"] - memory.state(awake=False)["weights"]
    assert awake == sum(asleep.values())
    lone = Memory(
        replace(run, component="dit", halves=run.halves[1:], method="supervised", plans=1, renders=1), networks
    )
    assert {part.name for part in lone.parts if part.sleeps} >= {"ar", "vae"}


def test_remedies_go_in_order_until_it_fits(networks, run):
    config = load_config(["configs/t2i_training.yaml"], [])
    peak = Memory(run, networks).peak().total
    memory_of = partial(Memory, networks=networks)
    assert remedies(config, run, memory_of, peak) == []
    found = remedies(config, run, memory_of, 40 * GIB)
    assert found[0].change == "rollout.micro_batch_size=1" and found[-1].peak <= 40 * GIB
    assert sum(each.saves for each in found) == pytest.approx(peak - found[-1].peak)
    hopeless = remedies(config, run, memory_of, GIB)
    assert hopeless[-1].change.startswith("data.image_size") and hopeless[-1].peak > GIB


def test_remedies_are_those_of_the_configuration_itself(networks):
    """Every change that names a key alone, applied to the file, gives the peak that is told."""
    wide = load_config(
        ["configs/t2i_training.yaml"], ["rollout.micro_batch_size=8", "training.gradient_checkpointing=false"]
    )
    found = remedies(wide, read_run(wide), partial(Memory, networks=networks), 42 * GIB)
    changes = [each.change for each in found]
    assert changes[0] == "training.gradient_checkpointing=true"
    again = load_config(["configs/t2i_training.yaml"], ["rollout.micro_batch_size=8", *changes])
    assert Memory(read_run(again), networks).peak().total == pytest.approx(found[-1].peak)


def test_steps_and_samples_are_those_of_a_run(tmp_path):
    changes = ["training.max_steps=null", "training.num_epochs=5", "training.gradient_accumulation_steps=3"]
    config = config_of(tmp_path, *changes)
    for gpus in (1, 2):
        found = schedule(config, replace(read_run(config), gpus=gpus))
        world = World(world_size=gpus)
        sampler = setup.build_sampler(config, world, range(len(PROMPTS)))  # type: ignore[arg-type]
        assert found.items == len(PROMPTS) and found.steps == setup.count_steps(config, sampler)
        assert found.prompts == 2 * 3 * gpus and found.images == found.prompts * config.group().size
    assert replace(found, steps=86_400).days(0.5, 2) == found.images, "a day for each image of a step"
