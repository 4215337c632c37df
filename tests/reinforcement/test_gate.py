"""What the on-policy gate lets pass."""

from __future__ import annotations

import pytest
import torch

from glm_training.reinforcement.gate import gate
from glm_training.reinforcement.gate.tolerance import Tolerance, tolerance_for
from tests.runs import trainer_of


def test_single_precision_judges_the_largest_deviation():
    tolerance = tolerance_for("ar", None, low_precision=False)
    assert tolerance == Tolerance(1e-4)
    assert tolerance.passes(torch.tensor([[0.0, 1e-4]]))
    assert not tolerance.passes(torch.tensor([[0.0, 1.1e-4]]))


def test_low_precision_judges_the_average():
    tolerance = tolerance_for("ar", None, low_precision=True)
    assert tolerance.passes(torch.tensor([[0.0, 0.09]]))
    assert not tolerance.passes(torch.tensor([[0.06, 0.06]]))


def test_denoising_steps_are_judged_by_the_largest_in_low_precision_too():
    assert tolerance_for("dit", None, low_precision=True) == Tolerance(1e-3)


def test_a_given_tolerance_is_taken_at_its_word():
    assert tolerance_for("dit", 0.3, low_precision=True) == Tolerance(0.3)


@pytest.mark.parametrize("average", [False, True])
def test_nan_never_passes(average):
    assert not Tolerance(1.0, average).passes(torch.tensor([[0.0, float("nan")]]))


@pytest.mark.parametrize("count", [1, 2, gate.ROWS, 3 * gate.ROWS])
def test_the_rows_that_are_replayed_reach_from_the_first_to_the_last(count):
    rows = gate._sample(count, torch.device("cpu")).tolist()
    assert len(rows) == len(set(rows)) == min(gate.ROWS, count) and rows == sorted(rows)
    assert {0, count - 1} <= set(rows) or gate.ROWS == 1


def test_a_bf16_run_passes_the_gate(tmp_path):
    figures = trainer_of(tmp_path, "training.mixed_precision=bf16").training_step()
    assert 0 < figures["gate/ar_log_prob_max"] < 0.05


@pytest.mark.parametrize("method", ["flow_grpo", "nft"])
def test_bf16_sees_the_reference_apart_from_the_trained_weights(tmp_path, method):
    """Autocast keeps casts of the weights; the policy must not be computed with those of the reference."""
    trainer = trainer_of(
        tmp_path,
        "training.mixed_precision=bf16",
        "model.component=dit",
        f"reward.grpo.dit.method={method}",
        "training.learning_rate=1.0",
        *(["reward.grpo.dit.old_decay=1.0"] if method == "nft" else []),
    )
    trainer.training_step()
    trainer.step += 1
    figures = trainer.training_step()
    assert figures["dit/kl"] > 1e-9
    if method == "nft":
        assert figures["dit/old_deviation"] > 1e-9
