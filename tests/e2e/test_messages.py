"""What the commands say and exit with, in this process: quicker than a new one for each."""

from __future__ import annotations

import logging
import sys

import pytest

from glm_training.cli import main
from tests.runs import write_config

TEXT_ONLY = "reward.metrics={text_accuracy: 1.0}"
TEXT_TOO = "reward.metrics={text_accuracy: 0.5, structure: 0.5}"


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["glm-train", *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code


@pytest.mark.parametrize("command", ["train", "validate"])
def test_rewards_that_do_not_fit_the_data_exit_2(command, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, command, "--config", str(write_config(tmp_path)), TEXT_ONLY) == 2
    told = capsys.readouterr().err
    assert "rewards do not fit the data" in told and "training data" in told and "add a metric" in told


@pytest.mark.parametrize("command", ["train", "validate"])
def test_notes_on_the_rewards_are_shown_once(command, tmp_path, monkeypatch, capsys):
    short = ["training.max_steps=1", "reward.grpo.updates_per_rollout=1"]
    assert run(monkeypatch, command, "--config", str(write_config(tmp_path)), TEXT_TOO, *short) == 0
    told = capsys.readouterr()
    assert told.out.count("prompts.txt): text_accuracy applies to 1 of 4 samples") == 1
    assert told.err == ""
    if command == "train":
        assert "text_accuracy applies to 1 of 4" in (tmp_path / "run" / "train.log").read_text()
        assert "AR and DiT halves of tiny-random on 4 prompts" in told.out and str(tmp_path / "run") in told.out


def test_overrides_may_stand_before_and_after_options(tmp_path, monkeypatch, capsys):
    config = str(write_config(tmp_path))
    words = ["validate", "seed=1", "--config", config, "training.max_stepz=3", "--mode", "t2i", "sede=4"]
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert "training.max_stepz" in told and "override `sede=4`" in told and "2 problems" in told
    assert run(monkeypatch, *words, "--fast") == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --confg x.yaml", "glm-train train: error: unrecognized arguments: --confg. Did you mean --config?"),
        ("doctor --quik=1", "glm-train doctor: error: unrecognized arguments: --quik=1. Did you mean --quick?"),
        ("sample --prompt a --xyz 3", "glm-train sample: error: unrecognized arguments: --xyz 3"),
        (
            "sample --model tiny --promt=x",
            "unrecognized arguments: --promt; one of the arguments --prompt --prompts is required. Did you mean",
        ),
        ("sample --mod tiny", "glm-train sample: error: one of the arguments --prompt --prompts is required"),
        (
            "export runs/x --formt lora",
            "arguments: --formt; the following arguments are required: --format, --out. Did",
        ),
        ("evaluate --suite genevl --out o", "argument --suite: invalid choice: 'genevl' (choose from"),
        ("evaluate --suite geneval", "glm-train evaluate: error: the following arguments are required: --out"),
        ("data .", "`.` is a folder, no YAML file; one of pictures is named in it: `data: {images: .}`"),
        ("tran", "'evaluate', 'export', 'report', 'doctor'). Did you mean train?"),
        ("xyz", "glm-train: error: argument COMMAND: invalid choice: 'xyz'"),
        (
            "train --config x.yaml --max-steps 5",
            "unrecognized arguments: --max-steps. A key of the configuration has no",
        ),
        ("plan x.yaml --training.batch_size=5", " has no dashes before it: training.batch_size=VALUE"),
        ("validate x.yaml --nonsense", " has no dashes before it: training.max_steps=100"),
    ],
)
def test_wrong_words_are_told_in_two_lines_with_what_to_do(words, told, monkeypatch, capsys):
    assert run(monkeypatch, *words.split()) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert told in first and second.endswith(" --help lists what there is")
    assert ("Did you mean" in first) == ("Did" in told)


def test_without_a_command_the_commands_are_listed(monkeypatch, capsys):
    assert run(monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: glm-train") and all(f"    {name} " in told for name in ("train", "sample", "doctor"))


def test_advice_on_kernels_of_the_processor_is_not_shown(monkeypatch, capsys):
    assert run(monkeypatch, "report", "nowhere") == 2
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("install kernels")
    assert "install kernels" not in capsys.readouterr().err


def test_a_device_that_is_not_there_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(monkeypatch, "train", "--config", str(write_config(tmp_path)), "model.device_map=cuda") == 2
    assert "model.device_map is 'cuda'" in capsys.readouterr().err
