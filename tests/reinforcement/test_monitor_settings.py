"""What is asked of monitors and cannot be meant, and what a run that they stop tells its caller."""

from __future__ import annotations

import sys

import pytest

from glm_training.cli.training import EXIT_MONITOR, main
from glm_training.config import ConfigError
from tests.runs import config_of, write_config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["reward.monitors.metrics=[structure]", "evaluation.enabled=true"], "`structure` is trained on"),
        (["reward.monitors.metrics=[text_accuracy]"], "scored in evaluations, and there are none"),
        (["reward.monitors.metrics=[text]", "evaluation.enabled=true"], "`text` is no metric"),
    ],
)
def test_held_out_metrics_that_cannot_be_meant(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=says):
        config_of(tmp_path, *overrides)


def test_the_exit_code_says_that_a_monitor_stopped_the_run(tmp_path, monkeypatch, capsys):
    small = ["model.component=ar", "training.batch_size=1", "reward.grpo.num_samples=2", "reward.monitors.window=1"]
    trip = ["reward.monitors.action=stop", "reward.monitors.brightness_change=1e-9"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(write_config(tmp_path)), *small, *trip])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == EXIT_MONITOR == 4
    assert "monitor brightness" in capsys.readouterr().err
