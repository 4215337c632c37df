"""With what `train` and `validate` exit, by what a run ends with."""

from __future__ import annotations

import argparse
import signal

import pytest

from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.cli import training
from glm_training.cli.validate import validate
from glm_training.data import DataError, Problem
from glm_training.engine.errors import GateError, NonFiniteError, ScoringError, SettingsError, TrainingError
from glm_training.models.loading import ModelLoadError
from glm_training.rewards import RewardBackendError, RewardConfigError, RewardError
from glm_training.trainers import run as runner
from glm_training.trainers.base_trainer import TrainResult
from glm_training.utils.distributed import DistributedError
from glm_training.utils.trackers import TrackerError
from tests.runs import write_config


def arguments(path, *overrides: str, **options) -> argparse.Namespace:
    given = {"config": [str(path)], "mode": None, "overrides": list(overrides), "resume": None, "train_both": False}
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    parsed = parser.parse_args(["--config", str(path)])
    for name, value in (given | options).items():
        setattr(parsed, name, value)
    return parsed


def exit_code(tmp_path, monkeypatch, end, *overrides: str, **options) -> int:
    """Of a run that ends with `end`, an error or a result; the configuration it was given is kept in `end.seen`."""
    seen = []

    def ending(config, **_):
        seen.append(config)
        if isinstance(end, BaseException):
            raise end
        return end

    monkeypatch.setattr(runner, "run_training", ending)
    code = training.run(arguments(write_config(tmp_path), *overrides, **options))
    exit_code.configs = seen  # type: ignore[attr-defined]
    return code


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (TrainResult(2), 0),
        (TrainResult(2, stopped_by=int(signal.SIGINT)), 130),
        (TrainResult(2, stopped_by=int(signal.SIGTERM)), 143),
        (TrainResult(2, halted="the monitor brightness tripped"), 4),
        (NonFiniteError("the gradient norm is nan", 4), 3),
        (SettingsError("a key"), 2),
        (DataError([Problem("prompts.txt", "is gone", "Put it back")]), 2),
        (RewardConfigError("a metric"), 2),
        (RewardBackendError("a file"), 2),
        (ModelLoadError("a model"), 2),
        (TrackerError("no key"), 2),
        (DistributedError("no address"), 2),
        (TrainingError("it cannot go on"), 1),
        (GateError("replay and rollout part"), 1),
        (ScoringError("no score"), 1),
        (RewardError("no score"), 1),
        (CheckpointError("it is damaged"), 1),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_the_exit_code_says_how_a_run_ended(tmp_path, monkeypatch, capsys, end, code):
    assert exit_code(tmp_path, monkeypatch, end) == code
    told = capsys.readouterr().err
    assert (told.strip() == "") == (code in (0, 130, 143)), "a fault is told on standard error"
    assert "Traceback" not in told


def test_a_faulty_configuration_exits_2_and_starts_nothing(tmp_path, monkeypatch, capsys):
    assert exit_code(tmp_path, monkeypatch, TrainResult(2), "training.learning_rates=1") == 2
    assert exit_code.configs == [] and "training.learning_rate" in capsys.readouterr().err
    assert validate([str(write_config(tmp_path))], ["training.learning_rates=1"], None) == 2
    assert validate([str(write_config(tmp_path))], ["training.use_reward=false"], None) == 0


def test_what_stands_behind_resume_is_a_checkpoint(tmp_path, monkeypatch):
    exit_code(tmp_path, monkeypatch, TrainResult(2), resume="step-000004")
    assert exit_code.configs[0].checkpoint.resume_from == "step-000004"
    exit_code(tmp_path, monkeypatch, TrainResult(2))
    assert exit_code.configs[0].checkpoint.resume_from is None


def test_both_halves_are_trained_where_asked(tmp_path, monkeypatch):
    exit_code(tmp_path, monkeypatch, TrainResult(2), "model.component=ar", train_both=True)
    assert exit_code.configs[0].model.component == "both"
