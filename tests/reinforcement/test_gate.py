"""What the on-policy gate lets pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glm_training.engine.errors import GateError
from glm_training.reinforcement.gate import gate
from glm_training.reinforcement.gate.tolerance import Tolerance, first_above, tolerance_for
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of


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


def test_a_tolerance_says_what_it_lets_pass():
    assert str(Tolerance(1e-4)) == "1e-04"
    assert str(Tolerance(0.05, average=True)) == "5e-02 on the average"


@pytest.mark.parametrize(
    ("deviation", "place"),
    [
        ([[0.1, 0.2, 0.9], [0.1, 0.6, 0.0]], (1, 1)),  # the earliest column, not the first row
        ([[0.1, 0.2, 0.9], [0.1, 0.3, 0.9]], (0, 2)),
        ([[0.5, 0.5], [0.5, 0.51]], (1, 1)),  # the limit itself is allowed
        ([[0.1, 0.2], [float("nan"), 0.9]], (1, 0)),
        ([[0.1, 0.2], [0.1, float("nan")]], (1, 1)),
    ],
)
def test_the_first_to_part_is_the_earliest_token_above_the_limit(deviation, place):
    assert first_above(torch.tensor(deviation), 0.5) == place


def plans(*grids: tuple[int, int]) -> SimpleNamespace:
    preview = sum(rows * columns for rows, columns in grids[:-1])
    return SimpleNamespace(prompt=SimpleNamespace(grids=grids, preview_length=preview))


@pytest.mark.parametrize(
    ("token", "place"),
    [
        (0, ("preview", (0, 0))),
        (2, ("preview", (0, 2))),
        (3, ("preview", (1, 0))),
        (5, ("preview", (1, 2))),
        (6, ("large", (0, 0))),
        (12, ("large", (0, 6))),
        (13, ("large", (1, 0))),
        (33, ("large", (3, 6))),
    ],
)
def test_a_token_lies_in_a_row_and_a_column_of_its_own_grid(token, place):
    """A preview of 2 x 3 tokens before a large grid of 4 x 7."""
    assert gate.place_of(plans((2, 3), (4, 7)), token) == place


def test_without_a_preview_the_first_token_is_of_the_large_grid():
    assert gate.place_of(plans((2, 3)), 4) == ("large", (1, 1))
    with pytest.raises(ValueError, match="token 6 lies outside the grids"):
        gate.place_of(plans((2, 3)), 6)


def test_a_situation_counts_the_update_that_it_is_before():
    assert str(gate.Situation(0, False, None)) == "before any update"
    assert str(gate.Situation(3, False, None)) == "before the update of step 4"
    assert gate.Situation(0, True, None).tolerance("ar") == Tolerance(0.05, average=True)
    assert gate.Situation(0, True, 0.2).tolerance("dit") == Tolerance(0.2)


def test_low_precision_has_another_way_out():
    assert gate._way_out(gate.Situation(0, False, None)) == "reward.grpo.gate: false switches this check off"
    assert gate._way_out(gate.Situation(0, True, None)).startswith("In low precision a larger reward.grpo.gate_tol")


def test_what_another_process_finds_stops_this_one_and_the_largest_deviation_is_logged(tmp_path, monkeypatch):
    """Two processes: what the other one has to say stands beside this one's."""
    others: list[tuple[Exception | None, dict[str, float]]] = []
    monkeypatch.setattr(gate, "gather_objects", lambda world, own: [own, *others])
    checked = gate.OnPolicyGate(config_of(tmp_path), World(0, 2), None, {})
    monkeypatch.setattr(checked, "_check_dit", lambda situation, method, renders: {"gate/x": 0.25})
    rollout = SimpleNamespace(plans=None, renders=None)
    others[:] = [(GateError("elsewhere"), {})]
    with pytest.raises(GateError, match="elsewhere"):
        checked.check(0, rollout, None, object())
    assert checked.due(0) and checked.state() == {"passed_at": None}, "what failed has not passed"
    for other, largest in ((0.125, 0.25), (0.5, 0.5)):
        fresh = gate.OnPolicyGate(config_of(tmp_path), World(0, 2), None, {})
        monkeypatch.setattr(fresh, "_check_dit", lambda situation, method, renders: {"gate/x": 0.25})
        others[:] = [(None, {"gate/x": other})]
        assert fresh.check(3, rollout, None, object()) == {"gate/x": largest}
        assert not fresh.due(4) and fresh.state() == {"passed_at": 3}


@pytest.mark.parametrize("average", [False, True])
def test_nan_never_passes(average):
    assert not Tolerance(1.0, average).passes(torch.tensor([[0.0, float("nan")]]))


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (2, [0, 1]), (3, [0, 2]), (12, [0, 11])])
def test_the_first_and_the_last_row_are_replayed(count, rows):
    assert gate._sample(count, torch.device("cpu")).tolist() == rows


def test_a_resumed_run_checks_at_once_and_then_when_the_undisturbed_one_would(tmp_path, monkeypatch):
    """Every fifth step after the third, at which the last check was made; the resume is at the fourth."""
    resumed = gate.OnPolicyGate(config_of(tmp_path, "reward.grpo.gate_interval=5"), World(), None, {})
    monkeypatch.setattr(resumed, "_check_dit", lambda situation, method, renders: {"gate/x": 0.25})
    rollout = SimpleNamespace(plans=None, renders=None)
    resumed.load({"passed_at": 3})
    assert resumed.due(4) and resumed.check(4, rollout, None, object()) == {}
    assert [resumed.due(step) for step in (4, 7, 8)] == [False, False, True]
    assert resumed.check(8, rollout, None, object()) == {"gate/x": 0.25} and resumed.state() == {"passed_at": 8}
    never = gate.OnPolicyGate(config_of(tmp_path, "reward.grpo.gate=false"), World(), None, {})
    assert not never.due(0)


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
