"""What a page says of the bytes of its phases comes to those bytes, and remedies are those of the strategy that `auto`
comes to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from glm_training.config import load_config
from glm_training.planning import plan as planning
from glm_training.planning.models import read_networks
from glm_training.planning.page import _peak
from glm_training.planning.plan import Card, Plan, make_plan

T2I, I2I = "configs/t2i_training.yaml", "configs/i2i_training.yaml"
SDXL, DMDR = ("configs/sdxl_dpo_lora.yaml", "configs/sdxl_dmdr_cold_start.yaml")
WHOLE = ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false")
ADAPTED = ("lora.enabled=true", "checkpoint.save_lora=true", "checkpoint.save_lora_only=true")
GIB = 1 << 30

Planner = Callable[..., Plan]


@pytest.fixture(scope="module")
def plan_of() -> Planner:
    read = cache(read_networks)

    def made(file: str, *overrides: str, gpus: int = 1, memory: float = 80) -> Plan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "read_networks", read)
            return make_plan(load_config([file], list(overrides)), gpus=gpus, card=Card(memory * GIB, "as named"))

    return made


@pytest.mark.parametrize(
    ("file", "overrides", "gpus"),
    [
        (T2I, (), 1),
        (T2I, ("distributed.strategy=fsdp",), 8),
        (T2I, ("distributed.strategy=fsdp", "distributed.offload=true"), 8),
        (T2I, (*WHOLE, "distributed.strategy=fsdp", "reward.grpo.kl_coef=0.1"), 8),
        (T2I, ("model.quantization=nf4",), 1),
        (T2I, (*WHOLE, "training.offload_between_phases=true", "reward.grpo.kl_coef=0.1"), 1),
        (SDXL, (), 1),
        (SDXL, ("model.torch_dtype=bfloat16", "training.mixed_precision=bf16"), 1),
        (DMDR, (), 1),
        (DMDR, ("training.optimizer=adamw", "training.mixed_precision=bf16", "distributed.strategy=fsdp"), 2),
    ],
)
def test_each_line_of_the_arithmetic_comes_to_its_bytes(plan_of, file, overrides, gpus):
    plan = plan_of(file, *overrides, gpus=gpus)
    seen = set()
    for phase in plan.phases:
        told = re.sub(r"\n {3,}", " ", "\n".join(_peak(replace(plan, phases=[phase]))))
        for label in ("weights", "masters", "moments"):
            if label not in phase.items:
                assert f"\n  {label} " not in told
                continue
            words = re.search(rf"\n  {label} +[\d.]+ +(.*)", told)[1]
            terms = re.findall(r"([\d.]+) billion (?:frozen |trained )?x ([\d.]+) bytes(?: / (\d+) GPUs)?", words)
            found = sum(float(count) * 1e9 * float(each) / int(over or 1) for count, each, over in terms)
            # counts are told to a million / 2, bytes of a weight to a part of 1e4, of its moments to a hundredth
            rel = 0.005 / 2 if label == "moments" else 3e-4
            assert found == pytest.approx(phase.items[label], abs=5e5 * 8 * len(terms), rel=rel), (phase.name, words)
            seen.add(label)
    assert seen == {"weights", "masters", "moments"} or "distributed.offload=true" in overrides


def test_the_columns_of_the_table_are_all_items(plan_of):
    from glm_training.planning.page import COLUMNS

    known = {item for items in COLUMNS.values() for item in items}
    plans = [plan_of(DMDR), plan_of(T2I, *WHOLE, "distributed.strategy=fsdp", "training.ema.decay=0.9", gpus=8)]
    assert all(set(phase.items) <= known for plan in plans for phase in plan.phases)


def test_changes_under_auto_are_planned_with_what_it_then_comes_to(plan_of):
    """On GPUs of 24 GiB `auto` takes shards, on which 8-bit AdamW does not work: with it, it would take whole
    copies."""
    plan = plan_of(T2I, gpus=3, memory=24)
    assert plan.run.strategy == "fsdp" and not plan.fits
    words = [word for each in plan.remedies for word in each.change.split()]
    again = plan_of(T2I, *words, gpus=3, memory=24)
    assert again.peak.total == pytest.approx(plan.remedies[-1].peak) and again.peak.total < plan.peak.total


def test_pictures_of_evaluations_are_decoded_in_the_batches_of_the_rollout(plan_of):
    """To which a change comes first where decoding takes most: it slows nothing else."""

    def evaluation(plan: Plan) -> float:
        return next(phase.total for phase in plan.phases if phase.name == "evaluation")

    plan, one = plan_of(T2I, "rollout.vae_batch_size=null", memory=42), plan_of(T2I)
    assert plan.remedies[0].change == "rollout.vae_batch_size=1"
    assert plan.run.micro == 2 and evaluation(plan) - evaluation(one) == pytest.approx(one.memory._decoding(1))


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_adapters_on_small_gpus_are_led_from_shards_to_whole_copies_in_few_bits(plan_of, strategy):
    """Shards would have to wait on the CPU, and quantization does not work on them: no single change leads there."""
    plan = plan_of(I2I, f"distributed.strategy={strategy}", gpus=3, memory=24)
    words = [word for each in plan.remedies for word in each.change.split()]
    assert plan.run.strategy == "fsdp" and "model.quantization=nf4" in words
    again = plan_of(I2I, f"distributed.strategy={strategy}", *words, gpus=3, memory=24)
    assert again.fits and again.peak.total == pytest.approx(plan.remedies[-1].peak)


def test_the_guidance_network_is_the_teacher_with_an_adapter_that_is_trained(plan_of):
    """As large as one of that rank on the generator; its weights, moments and gradients are there, and on the disk."""
    rank = 32
    plan = plan_of(DMDR, f"dmdr.guidance_rank={rank}")
    adapted = plan_of(DMDR, *ADAPTED, f"lora.rank={rank}", "training.optimizer=adamw")
    parts, small = plan.memory.by_name, adapted.memory.by_name
    assert parts["guidance"].trained_count == small["unet"].trained_count > 0
    assert parts["guidance"].frozen == parts["unet"].trained_count, "all of the UNet is trained"
    both = parts["unet"].trained_count + small["unet"].trained_count
    steps = {phase.name: phase.items for phase in plan.phases}
    assert steps["guidance: optimizer step"]["masters"] == steps["UNet: optimizer step"]["gradients"] == 4 * both
    assert plan.disk.items["trained weights"] == 4 * both
    assert plan.disk.items["adapters"] == 4 * small["unet"].trained_count and "pipeline" in plan.disk.items
    assert adapted.disk.items["optimizer"] == 8 * 2 * small["unet"].trained_count
