"""`glm-train export` as a user meets it, and what the hub gets of `--push`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_training.cli.main import main
from tests import preference_runs
from tests.export.exporting import DRAWN
from tests.export.hub import serving
from tests.warm import run as warm_run

TOKEN = "hf_" + "Ab3" * 10
COMMAND = ("-m", "glm_training.cli.main", "export")


@pytest.fixture(scope="module")
def dpo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    preference_runs.trainer_of(folder, "sdxl", *DRAWN, "training.max_steps=1").train()
    return folder / "run"


def test_the_real_command_in_real_processes_pushes(dpo, tmp_path):
    """huggingface_hub's own client, to a server of this machine: every file as it lies here, and no other."""
    out = tmp_path / "out"
    words = [*COMMAND, str(dpo), "--format", "lora", "--out", str(out), "--push", "someone/there"]
    with serving() as hub:
        changes = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, *words], env=_environment(changes), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        for part in ("its best", "bit for bit in fp32", f"pushed to {hub.address}/someone/there", "lora of step 1:"):
            assert part in done.stdout, done.stdout
        assert [(each["name"], each["visibility"]) for each in hub.made] == [("there", "private")]
        here = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert hub.files == here and len(here) == 5
        assert all(TOKEN.encode() not in data for data in here.values()) and hub.tokens == {f"Bearer {TOKEN}"}
        hub.refuses = 403
        words = [*words, "--no-draw"]
        words[words.index(str(out))] = str(tmp_path / "again")
        done = subprocess.run([sys.executable, *words], env=_environment(changes), capture_output=True, text=True)
        assert done.returncode == 1 and f"not pushed to {hub.address}/someone/there" in done.stderr
        assert f"then hf upload someone/there {tmp_path / 'again'} --private" in done.stderr
        assert TOKEN not in done.stderr + done.stdout and (tmp_path / "again/README.md").is_file()


def _environment(changes: dict[str, str]) -> dict[str, str]:
    return os.environ | changes


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--format", "pipeline", "--out", "{out}"], 2, "add --merge, or choose --format lora"),
        (["--format", "lora", "--out", "{out}", "--merge"], 2, "--merge puts adapters into the weights"),
        (["--format", "lora", "--out", "{out}", "--ema"], 2, "has no average of its weights"),
        (["--format", "lora", "--out", "{out}", "--public"], 2, "--public says for whom --push"),
        (["--format", "lora", "--out", "{out}", "--push", "x"], 2, "write owner/name"),
        (["--format", "lora", "--out", "{out}", "--push", "a/b"], 2, "push later: hf upload a/b {out} --private"),
        (["--format", "lora", "--out", "{there}"], 2, "is there already"),
        (["--format", "lora", "--out", "{run}"], 2, "the checkpoint itself lies there"),
        (["--format", "lora", "--out", "{run}/config.yaml/x"], 2, "not a folder"),
        (["--format", "pickle", "--out", "{out}"], 2, "invalid choice"),
        (["--format", "lora"], 2, "required: --out"),
    ],
)
def test_refusals(dpo, tmp_path, monkeypatch, capsys, words, code, why):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    places = {"out": str(tmp_path / "out"), "run": str(dpo), "there": str(tmp_path / "there")}
    monkeypatch.setattr(sys, "argv", ["glm-train", "export", str(dpo), *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    assert stop.value.code == code and why.format(**places) in told and "Traceback" not in told, told
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


def test_help_fits_a_terminal():
    done = warm_run(*COMMAND, "--help", changes={"COLUMNS": "80"})
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stdout
    for option in ("--format", "--out", "--merge", "--ema", "--dtype", "--push", "--draw"):
        assert option in done.stdout
