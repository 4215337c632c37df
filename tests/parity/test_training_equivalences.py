"""Runs that must come to the same weights: accumulation, checkpointing, resume, two processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world
from tests.opd_runs import OPD, write_experts
from tests.parity.launching import run_two_processes
from tests.parity.two_process_worker import CASES, EVALUATED
from tests.runs import config_of, trainer_of, weights_of, write_config
from tests.same import assert_identical

MODES = ["t2i", "i2i"]


def stepped(tmp_path: Path, *overrides: str, mode: str = "t2i", steps: int = 1):
    trainer = trainer_of(tmp_path, *overrides, mode=mode)
    before = weights_of(trainer)
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return before, weights_of(trainer)


def largest_difference(left, right) -> float:
    assert left.keys() == right.keys()
    return max((left[half][name] - right[half][name]).abs().max().item() for half in left for name in left[half])


def assert_same(tmp_path: Path, first: list[str], second: list[str], *, mode: str = "t2i") -> None:
    before, left = stepped(tmp_path, *first, mode=mode)
    _, right = stepped(tmp_path, *second, mode=mode)
    for half in left:
        assert largest_difference({half: before[half]}, {half: left[half]}) > 1e-4, f"{half} did not learn"
    assert largest_difference(left, right) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["flow_grpo", "nft", "dgpo"])
def test_four_chunks_of_one_prompt_equal_one_chunk_of_four_in_reward_training(tmp_path, method, mode):
    shared = [f"reward.grpo.dit.method={method}", "reward.grpo.num_samples=4"]
    chunked = ["training.batch_size=1", "training.gradient_accumulation_steps=4"]
    assert_same(tmp_path, [*shared, *chunked], [*shared, "training.batch_size=4"], mode=mode)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_accumulation_holds_for_each_aggregation_with_several_updates_per_rollout(tmp_path, aggregation):
    shared = [
        "model.component=ar",
        f"reward.grpo.loss_aggregation={aggregation}",
        "reward.grpo.num_samples=4",
        "reward.grpo.updates_per_rollout=2",
    ]
    chunked = ["training.batch_size=1", "training.gradient_accumulation_steps=4"]
    assert_same(tmp_path, [*shared, *chunked], [*shared, "training.batch_size=4"])


@pytest.mark.parametrize("mode", MODES)
def test_four_chunks_of_one_prompt_equal_one_chunk_of_four_in_supervised_training(tmp_path, mode):
    shared = ["training.use_reward=false"]
    chunked = ["training.batch_size=1", "training.gradient_accumulation_steps=4"]
    assert_same(tmp_path, [*shared, *chunked], [*shared, "training.batch_size=4"], mode=mode)


def test_micro_batches_change_nothing(tmp_path):
    assert_same(tmp_path, ["rollout.micro_batch_size=null"], ["rollout.micro_batch_size=3"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_reward", ["true", "false"])
def test_gradient_checkpointing_changes_nothing(tmp_path, use_reward, mode):
    shared = [f"training.use_reward={use_reward}"]
    assert_same(
        tmp_path,
        [*shared, "training.gradient_checkpointing=true"],
        [*shared, "training.gradient_checkpointing=false"],
        mode=mode,
    )


@pytest.mark.parametrize(
    "kind",
    [
        ["model.component=ar"],
        ["model.component=ar", "reward.grpo.ar.similarity_weighting=true", "reward.grpo.ar.entropy_reward=0.4"],
        ["model.component=dit", "reward.grpo.dit.method=nft"],
        ["model.component=dit", "reward.grpo.dit.method=dgpo", "reward.grpo.dit.timesteps_per_sample=1"],
        ["model.component=both"],
        ["model.component=both", "reward.grpo.dit.method=nft", "reward.grpo.dit.old_decay=0.5"],
        ["model.component=both", "lora.enabled=true", "lora.rank=2", "lora.alpha=4"],
        OPD,
    ],
    ids=["ar", "ar-stage", "dit-nft", "dit-dgpo", "both", "both-nft", "both-lora", "opd"],
)
def test_four_steps_equal_two_steps_and_a_resume_bit_for_bit(tmp_path, kind):
    if kind is OPD:
        write_experts(tmp_path)
    shared = [
        *(key.replace("FOLDER", str(tmp_path)) for key in kind),
        "training.optimizer=adamw",
        "training.adam_beta1=0.9",
        "training.learning_rate=1e-3",
        "training.lr_scheduler=cosine",
        "training.max_steps=4",
        "logging.save_interval=2",
    ]
    build_trainer(config_of(tmp_path, *shared, f"output_dir={tmp_path}/whole"), init_world(True, None)).train()
    resume = f"checkpoint.resume_from={tmp_path}/whole/checkpoints/step-000002"
    build_trainer(config_of(tmp_path, *shared, f"output_dir={tmp_path}/half", resume), init_world(True, None)).train()
    left = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-000004")
    right = load_checkpoint(tmp_path / "half" / "checkpoints" / "step-000004")
    assert_identical(left, right)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory) -> Path:
    """Every case trained for two steps by two gloo processes, on the prompts that one process draws as one batch."""
    folder = tmp_path_factory.mktemp("ddp")
    for mode in MODES:
        write_config(folder, mode)
    write_experts(folder)
    run_two_processes("two_process_worker.py", str(folder), f"distributed.strategy={request.param}")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], tuple]:
    """The weights of a case before and after two steps of one process, which both strategies are held against."""
    folder = tmp_path_factory.mktemp("alone")
    write_experts(folder)
    whole = ["training.batch_size=4", "training.gradient_accumulation_steps=1", "rollout.micro_batch_size=null"]

    @cache
    def trained(case: str) -> tuple:
        mode, overrides = CASES[case]
        return stepped(folder, *(key.replace("FOLDER", str(folder)) for key in overrides), *whole, mode=mode, steps=2)

    return trained


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_double_batch(two_processes, alone, case):
    ranks = [torch.load(two_processes / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    before, after = alone(case)
    assert largest_difference(ranks[0]["weights"], ranks[1]["weights"]) == 0.0, "ranks differ"
    assert largest_difference(ranks[0]["weights"], after) <= 1e-5
    for name in after:
        assert largest_difference({name: before[name]}, {name: after[name]}) > 1e-4
    for first, second in zip(ranks[0]["indices"], ranks[1]["indices"], strict=True):
        assert not set(first) & set(second), "ranks drew the same prompts"


def test_two_processes_evaluate_as_one_and_stop_together(two_processes):
    ranks = [torch.load(two_processes / f"evaluation-{rank}.pt", weights_only=True) for rank in (0, 1)]
    trainer = trainer_of(two_processes, *EVALUATED, f"output_dir={two_processes}/alone")
    trainer.train()
    expected = trainer.evaluations.before
    assert expected is not None and len(expected.scores["total"]) == 3
    for rank in ranks:
        torch.testing.assert_close(rank["scores"]["total"], expected.scores["total"], atol=1e-5, rtol=0)
        # kept in 8 bits: a value beside the middle of two levels may go to either
        torch.testing.assert_close(rank["images"], expected.images, atol=1 / 255 + 1e-6, rtol=0)
        assert rank["stopped"] == [0, signal.SIGTERM], "a signal in one process stops all, within the evaluation"


def test_two_processes_stop_together_where_no_sample_has_a_score(two_processes):
    told = [(two_processes / f"nothing-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert told[0] == told[1] and "rank 0 has no eyes" in told[0]
    assert told[0].startswith("not one of the 16 samples of step 1 has a score")
    assert (two_processes / "nothing" / "checkpoints" / "latest").read_text().strip() == "step-000000"
