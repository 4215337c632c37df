"""Preference runs that must come to the same weights: accumulation, checkpointing, resume, two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.trainers import dpo_trainer
from tests.parity.launching import run_two_processes
from tests.parity.preference_worker import CASES
from tests.preference_runs import config_of, stepped, trainer_of
from tests.runs import weights_of
from tests.same import assert_identical

FULL = ["lora.enabled=false", "checkpoint.save_lora_only=false"]


def largest_difference(left, right) -> float:
    assert left.keys() == right.keys()
    return max((left[part][name] - right[part][name]).abs().max().item() for part in left for name in left[part])


@pytest.mark.parametrize("case", CASES)
def test_two_chunks_of_one_pair_equal_one_chunk_of_two(tmp_path, case) -> None:
    family, overrides = CASES[case]
    start = weights_of(trainer_of(tmp_path, family, *overrides))
    chunked = ["training.batch_size=1", "training.gradient_accumulation_steps=2"]
    left = weights_of(stepped(tmp_path, family, *overrides, *chunked))
    right = weights_of(stepped(tmp_path, family, *overrides, "training.batch_size=2"))
    moved = largest_difference(start, left)
    assert moved > 1e-5
    assert largest_difference(left, right) <= max(1e-6, 0.01 * moved)  # Adam magnifies rounding where gradients vanish


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_gradient_checkpointing_changes_nothing(tmp_path, family) -> None:
    left, right = (
        weights_of(stepped(tmp_path, family, f"training.gradient_checkpointing={wanted}"))
        for wanted in ("true", "false")
    )
    assert largest_difference(left, right) <= 1e-6


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sdxl", []),
        ("sdxl", FULL),
        ("sdxl", ["dpo.loss=sft"]),
        ("glm_image", []),
        ("glm_image", ["lora.enabled=true", "lora.rank=2", "lora.alpha=4"]),
        ("glm_image", ["model.component=ar", "dpo.cache=false", "dpo.cache_dir=null"]),
    ],
    ids=["unet-lora", "unet-full", "unet-sft", "both-full", "both-lora", "ar-uncached"],
)
def test_four_steps_equal_two_steps_and_a_resume_bit_for_bit(tmp_path, family, kind, monkeypatch) -> None:
    shared = [
        *kind,
        "training.optimizer=adamw",
        "training.adam_beta1=0.9",
        "training.learning_rate=1e-3",
        "training.lr_scheduler=cosine",
        "training.max_steps=4",
        "logging.save_interval=2",
    ]
    trainer_of(tmp_path, family, *shared, f"output_dir={tmp_path}/whole").train()
    monkeypatch.setattr(dpo_trainer, "sequence_log_probs", None)  # the reference comes with the checkpoint
    resume = f"checkpoint.resume_from={tmp_path}/whole/checkpoints/step-000002"
    trainer_of(tmp_path, family, *shared, f"output_dir={tmp_path}/half", resume).train()
    left = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-000004")
    right = load_checkpoint(tmp_path / "half" / "checkpoints" / "step-000004")
    assert_identical(left, right)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory) -> Path:
    """Every case trained for two steps by two gloo processes that fill one cache together."""
    folder = tmp_path_factory.mktemp("preference")
    for family in ("sdxl", "glm_image"):
        config_of(folder, family)  # writes the files
    run_two_processes("preference_worker.py", str(folder), f"distributed.strategy={request.param}")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], tuple]:
    """Of a case on one process the weights at the start and after two steps, and how it is judged then: what both
    strategies are held against."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def trained(case: str) -> tuple:
        family, overrides = CASES[case]
        keys = [*overrides, f"dpo.cache_dir={folder}/cache", f"evaluation.eval_pairs={folder}/pairs"]
        start = weights_of(trainer_of(folder, family, *keys))
        trainer = stepped(folder, family, "training.batch_size=2", *keys)
        return start, weights_of(trainer), trainer.validate()

    return trained


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_double_batch(two_processes, alone, case) -> None:
    ranks = [torch.load(two_processes / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    family, _ = CASES[case]
    start, after, held_out = alone(case)
    assert largest_difference(ranks[0]["weights"], ranks[1]["weights"]) == 0.0, "ranks differ"
    assert largest_difference(ranks[0]["weights"], after) <= 1e-5
    assert largest_difference(start, after) > 1e-5
    for rank in ranks:
        for name, value in held_out.items():
            if not name.endswith("accuracy"):  # margins of two steps are near 0: their signs are rounding
                assert rank["held_out"][name] == pytest.approx(value, abs=2e-4), name
    images = 8 if "sft" not in case else 4
    filled = len(list((two_processes / f"cache-{case}").rglob("*.safetensors")))
    assert filled == images + (4 if family == "sdxl" else 2), "each image, prompt and quoted word once"
