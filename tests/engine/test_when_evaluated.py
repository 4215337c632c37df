"""At which steps a run scores and draws, and what a resumed one has to do first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glm_training.engine.evaluations import Evaluations
from glm_training.evaluation.held_out import Evaluation
from glm_training.utils.distributed import World
from tests.runs import config_of

KEYS = ["evaluation.enabled=true", "logging.log_images=true", "logging.eval_interval=4", "logging.sample_interval=3"]


def evaluations_of(tmp_path, *overrides: str, total_steps: int = 10) -> Evaluations:
    held_out = type("HeldOut", (), {"fingerprint": lambda self: "0" * 64, "__len__": lambda self: 2})()
    config = config_of(tmp_path, *KEYS, *overrides)
    console = SimpleNamespace(line=lambda text: None)
    return Evaluations(config, World(), console, None, held_out, object(), total_steps)  # type: ignore[arg-type]


def test_scores_and_samples_come_at_their_own_intervals_and_at_the_end(tmp_path):
    evaluations = evaluations_of(tmp_path)
    assert all(evaluations.scores_due(step) for step in range(11)), "the first scores are always due"
    evaluations.before = scores(0.25)
    assert [step for step in range(11) if evaluations.scores_due(step)] == [0, 4, 8, 10]
    assert [step for step in range(11) if evaluations.samples_due(step)] == [0, 3, 6, 9, 10]
    assert [step for step in range(11) if evaluations.due(step)] == [0, 4, 8, 10]
    assert not any(evaluations.judging_due(step) for step in range(11)), "there is nothing to judge"


def test_without_evaluation_there_are_no_scores_and_without_pictures_no_samples(tmp_path):
    plain = evaluations_of(tmp_path, "evaluation.enabled=false", "logging.log_images=false")
    assert not any(plain.scores_due(step) or plain.samples_due(step) for step in range(11))


def scores(value: float) -> Evaluation:
    return Evaluation({"total": torch.tensor([value, value])}, torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))


def test_the_first_scores_come_back_at_their_step_with_their_pictures(tmp_path):
    evaluations, again = evaluations_of(tmp_path), evaluations_of(tmp_path)
    evaluations.before, evaluations.before_step = scores(0.25), 4
    again.load(evaluations.state())
    assert (again.before_step, again.before.means()) == (4, {"total": 0.25})
    assert again.before.images.flatten().tolist() == pytest.approx([0, 128 / 255, 1])


@pytest.mark.parametrize("changed", ["evaluation.seed=99", "evaluation.guidance_scale=3", "model.ar.temperature=0.5"])
def test_scores_under_other_settings_are_not_taken_over(tmp_path, changed):
    evaluations, again = evaluations_of(tmp_path), evaluations_of(tmp_path, changed)
    evaluations.before = scores(0.25)
    again.load(evaluations.state())
    assert again.before is None and again.recorded(4) is None


def test_only_a_complete_run_evaluated_twice_is_compared(tmp_path):
    evaluations = evaluations_of(tmp_path)
    evaluations.world = World(1, 2)  # which writes no table
    evaluations.before, evaluations.after = scores(0.25), scores(0.75)
    assert evaluations.compared(9) == ({}, {})
    assert evaluations.compared(10) == ({"total": 0.25}, {"total": 0.75})
    evaluations.before_step = 10
    assert evaluations.compared(10) == ({}, {})


def test_a_resumed_run_evaluates_what_the_one_before_did_not(tmp_path):
    evaluations = evaluations_of(tmp_path, "logging.sample_interval=3")
    run = evaluations.config.output_dir
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"step": 4, "eval/total": 0.5}\n')
    assert evaluations.recorded(4) is None, "it has no first scores to compare with"
    evaluations.before = scores(0.25)
    assert evaluations.recorded(4)["eval/total"] == 0.5
    assert evaluations.recorded(8) is None and evaluations.recorded(5) == {}
    assert evaluations.recorded(6) is None, "the pictures are missing"
    evaluations.samples_dir(6).mkdir(parents=True)
    (evaluations.samples_dir(6) / "prompts.txt").write_text("a\n")
    assert evaluations.recorded(6) == {}
