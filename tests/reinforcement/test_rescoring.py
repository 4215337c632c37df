"""In low precision ratios start from the log-probs of the passes that train, so nothing is clipped before it moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glm_training.engine.errors import GateError
from glm_training.reinforcement import updates
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.rollout import Rollout
from glm_training.rewards import RewardResult
from glm_training.trainers import reward_trainer
from tests.runs import config_of, trainer_of

TWO_UPDATES = (
    "reward.grpo.updates_per_rollout=2",
    "training.batch_size=1",
    "reward.grpo.num_samples=8",
    "rollout.plans_per_prompt=4",
    "rollout.renders_per_plan=2",
    "rollout.micro_batch_size=3",
    "reward.grpo.ar.clip_range=1e-5",
    "reward.grpo.dit.clip_range=1e-5",
    "reward.grpo.kl_coef=0.1",
)
STILL = "training.learning_rate=1e-30"
"""Changes no weight: every ratio of every update ought to be 1."""
BF16 = ["training.mixed_precision=bf16"]


@pytest.mark.parametrize(
    ("precision", "rescore", "expected"),
    [
        (["training.mixed_precision=no", "model.torch_dtype=float32"], "auto", False),
        (["training.mixed_precision=bf16", "model.torch_dtype=float32"], "auto", True),
        (["training.mixed_precision=fp16", "model.torch_dtype=float32"], "auto", True),
        (["training.mixed_precision=no", "model.torch_dtype=bfloat16"], "auto", True),
        (["training.mixed_precision=bf16"], "false", False),
        (["training.mixed_precision=no", "model.torch_dtype=float32"], "true", True),
    ],
)
def test_it_is_on_where_passes_round(tmp_path, precision, rescore, expected):
    assert config_of(tmp_path, *precision, f"rollout.rescore={rescore}").rescores() is expected


@pytest.mark.parametrize(
    "precision",
    [
        BF16,
        ["training.mixed_precision=fp16", "reward.grpo.dit.method=awm"],
        ["model.torch_dtype=bfloat16", "lora.enabled=true", "lora.rank=2", "reward.grpo.dit.ratio=guard"],
        [
            *BF16,
            "reward.grpo.dit.divergence_threshold=1e-9",
            "reward.grpo.ar.entropy_coef=0.1",
            "training.gradient_checkpointing=true",
        ],
    ],
    ids=["bf16", "fp16, awm", "bf16 weights, guard", "dppo"],
)
def test_without_learning_no_ratio_leaves_1_and_nothing_is_clipped(tmp_path, precision):
    """In both updates of a rollout, with shipped clips, although rows are drawn and trained in other groupings."""
    figures = trainer_of(tmp_path, *TWO_UPDATES, STILL, *precision).training_step()
    for half in ("ar", "dit"):
        assert figures[f"{half}/ratio_deviation_max"] == 0 and figures[f"{half}/clip_fraction"] == 0
        assert figures[f"{half}/kl"] == 0, "the reference is asked about the same rows at once"
    assert 0 < figures["ar/replay_gap"] <= figures["ar/replay_gap_max"], "one pass rounds otherwise than a decode"


def test_later_updates_are_measured_against_the_policy_that_drew(tmp_path):
    """The first update moves the weights; the rows of the second have another ratio then."""
    figures = trainer_of(tmp_path, *TWO_UPDATES, *BF16, "training.learning_rate=0.05").training_step()
    for half in ("ar", "dit"):
        assert figures[f"{half}/ratio_deviation_max"] > 1e-5


def test_rescoring_changes_nothing_in_fp32(tmp_path):
    """Where passes do not round apart, a run with it and one without learn the same."""
    found = {}
    for rescore in ("true", "false"):
        trainer = trainer_of(tmp_path, *TWO_UPDATES, f"rollout.rescore={rescore}", "reward.grpo.dit.clip_range=0.1")
        before = {name: value.detach().clone() for name, value in trainer.parts["dit"].parameters.items()}
        trainer.training_step()
        found[rescore] = {name: value.detach() for name, value in trainer.parts["dit"].parameters.items()}
    moved = max((found["true"][name] - before[name]).abs().max().item() for name in before)
    apart = max((found["true"][name] - found["false"][name]).abs().max().item() for name in before)
    assert moved > 1e-4 and apart <= 1e-3 * moved


def test_a_rollout_that_drew_otherwise_is_still_stopped_by_the_gate(tmp_path, monkeypatch):
    """The gate reads what was recorded while drawing, before it is scored again."""
    real = reward_trainer.draw_rollout

    def hotter(*arguments, **options):
        rollout = real(*arguments, **options)
        rollout.plans = replace(rollout.plans, log_probs=rollout.plans.log_probs - 0.5)
        return rollout

    monkeypatch.setattr(reward_trainer, "draw_rollout", hotter)
    with pytest.raises(GateError, match="AR half's replayed log-probs differ"):
        trainer_of(tmp_path, *TWO_UPDATES, *BF16, "rollout.rescore=true").training_step()


def test_every_pass_takes_the_same_rows_together(tmp_path):
    """Row r belongs to update r mod 2, in micro-batches of three, over two chunks of seven rows."""
    trainer = trainer_of(tmp_path, *TWO_UPDATES)
    plans, result = torch.zeros(7), RewardResult(torch.zeros(7), {})
    chunks = [Scored(Rollout(["a"], [k], plans, plans, plans, None, None), result, k) for k in range(2)]
    slices = updates._slices(trainer.learning(), trainer.parts["ar"], chunks, 7)
    rows = [(piece.update, piece.chunk, piece.rows.tolist()) for piece in slices]
    first = [(0, 0, [0, 2, 4]), (0, 0, [6]), (0, 1, [1, 3, 5])]  # the second chunk's row 0 is the step's row 7
    assert rows == [*first, (1, 0, [1, 3, 5]), (1, 1, [0, 2, 4]), (1, 1, [6])]
