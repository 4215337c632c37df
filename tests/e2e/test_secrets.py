"""No secret leaves by any way out: messages of the command line, the terminal, files of a run, trackers, tracebacks."""

from __future__ import annotations

import io
import logging
import sys
import types

import pytest
import torch

from glm_training.cli.main import main
from glm_training.config import ConfigError, config_diff, load_config, resolved_yaml
from glm_training.engine.resuming import save_context
from glm_training.utils.console import Console
from glm_training.utils.redaction import mask_logs_and_tracebacks, redact_values, same_but_for_secrets
from glm_training.utils.trackers import TensorBoardTracker, Wandb, WandbTracker
from tests.runs import config_of, write_config

SECRET = "hf_a1B2c3D4e5F6g7H8i9J0"


@pytest.mark.parametrize(
    "override",
    [
        f"reward.options.remote.judge.url=http://:{SECRET}@host",
        f"reward.options.remote.judge.url=http://host?key={SECRET}",
        f"model.nme={SECRET}",
        f"{SECRET}=1",
        f"logging.wandb_project=[{SECRET}]",
        f"training.max_steps={SECRET}",
        f"training.max_steps={'x' * 45}.{SECRET}",
        f"seed: {{hf_token: {SECRET}}}",
        f"seed={{hf_token: {SECRET}, hf_token: 1}}",
        f"data=Bearer-{SECRET}",
    ],
)
def test_what_is_wrong_with_an_override_is_told_without_its_secret(tmp_path, override):
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path), [override])
    assert SECRET[:12] not in str(caught.value).replace("hf_token", "")


@pytest.mark.parametrize("words", [["--api-key=12345x", "--prompt", "a"], ["--prompt", "a", f"--token={SECRET}"]])
def test_argparse_repeats_no_secret(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["glm-train", "sample", *words])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "unrecognized arguments: --" in told and "***" in told and "12345x" not in told and SECRET not in told


def test_the_terminal_shows_none(capsys):
    out, errors = io.StringIO(), io.StringIO()
    console = Console(output=out, errors=errors)
    console.line(f"a {SECRET}")
    console.error(f"b {SECRET[:5]}\x07{SECRET[5:]}")  # control characters go before it is masked
    console.table("c", ["name", "value"], [[SECRET, 1.0]])
    shown = out.getvalue() + errors.getvalue()
    assert SECRET not in shown and shown.count("***") == 3


def test_files_of_a_run_hold_none_and_a_run_resumes_from_them(tmp_path, monkeypatch):
    config = config_of(tmp_path, f"logging.wandb_entity={SECRET}", f"model.name=https://:{SECRET}@host/x")
    texts = (resolved_yaml(config), str(save_context(config, {})))
    assert all(SECRET not in text and "***" in text for text in texts)
    path = tmp_path / "masked.yaml"
    path.write_text(texts[0])
    again = load_config(path)
    assert again.logging.wandb_entity == "***" and again.model.name == "https://***@host/x"
    assert config_diff(again, config) == config_diff(config, again) == []
    other = load_config(path, ["model.name=https://:pw@host/y"])
    assert config_diff(config, other) == ["model.name: 'https://***@host/x' -> 'https://***@host/y'"]
    monkeypatch.setenv("MY_TOKEN", "tiny-random")  # a secret that is an everyday word: masked there, and the same run
    plain = config_of(tmp_path)
    path.write_text(resolved_yaml(plain))
    monkeypatch.delenv("MY_TOKEN")
    assert config_diff(load_config(path), plain) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a***c", "abc", True), ("a***c", "abd", False), ("***", "x", True), ("a*b", "axb", False), ("a", "a", True),
        ({"a": "***"}, {"a": "x"}, True), ({"a": "***"}, {"b": "x"}, False), (["***"], ["x", "y"], False),
        (1, 1.0, True), (None, "***", False),
    ],
)  # fmt: skip
def test_masked_settings_are_the_same_as_what_they_mask(one, other, same):
    assert same_but_for_secrets(one, other) is same is same_but_for_secrets(other, one)


def test_a_section_that_is_named_like_a_secret_stays_a_section():
    settings = {"my_secret": {"url": "http://h", "n": 3}, "api_key": 12, "password": True, "hub_token": ""}
    assert redact_values(settings) == settings | {"api_key": "***"}


def test_tensorboard_captions(tmp_path):
    written = []
    tracker = TensorBoardTracker(tmp_path, None)
    tracker._writer.add_text = lambda tag, text, step: written.append(text)
    tracker.images(1, "samples", torch.zeros(2, 3, 8, 8), [f"a sign {SECRET}", 'a door, password: "OPEN"'])
    tracker.close()
    assert written == ["a sign ***", 'a door, password: "OPEN"']


class Run:
    id = "run"

    def __init__(self):
        self.logged = []

    def define_metric(self, *names, **options): ...

    def log(self, values):
        self.logged.append(values)


def test_weights_and_biases_gets_masked_settings_and_captions_and_no_command_line(tmp_path, monkeypatch):
    given, run = {}, Run()
    fake = types.SimpleNamespace(
        Settings=lambda **options: options,
        init=lambda **options: given.update(options) or run,
        Image=lambda picture, caption: caption,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sys, "argv", ["train.py", f"logging.wandb_entity={SECRET}"])
    settings = {"model": {"name": f"http://{SECRET}@h"}, "hf_token": "abc", "seed": 1}
    service = Wandb("p", None, "offline")
    tracker = WandbTracker(tmp_path, service, False, settings)
    assert given["config"] == {"model": {"name": "http://***@h"}, "hf_token": "***", "seed": 1}
    assert given["settings"]["x_disable_meta"] is True
    tracker.images(1, "samples", torch.zeros(1, 3, 8, 8), [f"a {SECRET}"])
    assert run.logged[-1]["samples"] == ["a ***"]
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    WandbTracker(tmp_path, service, False, settings)
    assert given["settings"]["x_disable_meta"] is False


def test_tracebacks_and_early_log_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    formatter = logging.lastResort.formatter
    try:
        mask_logs_and_tracebacks()
        try:
            raise RuntimeError(f"no {SECRET}")
        except RuntimeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
        line = logging.lastResort.format(logging.LogRecord("a", 30, "f", 1, "hub says %s", (SECRET,), None))
    finally:
        logging.lastResort.setFormatter(formatter)
    told = capsys.readouterr().err
    assert "RuntimeError: no ***" in told and SECRET not in told and line == "hub says ***"
