"""Where the system has no fcntl and no SIGUSR1, as Windows, everything imports and a run trains, stops and resumes."""

from __future__ import annotations

from tests.runs import write_config
from tests.warm import run

LACKING = ("fcntl", "resource", "termios", "pwd", "grp")
LACKING_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGKILL", "SIGQUIT")

PROGRAM = f"""
import importlib, os, pkgutil, signal, sys


import torch, transformers, diffusers, peft, scipy.stats, torchvision  # theirs may use what their system has
signals = {{name: getattr(signal, name) for name in {LACKING_SIGNALS}}}
for name in signals:
    delattr(signal, name)
for name in {LACKING}:
    sys.modules[name] = None

import glm_training
for module in pkgutil.walk_packages(glm_training.__path__, "glm_training."):
    importlib.import_module(module.name)
for name, number in signals.items():
    setattr(signal, name, number)  # libraries that load later
from glm_training.utils.signals import SIGNALS
assert [number.name for number in SIGNALS] == ["SIGINT", "SIGTERM"], SIGNALS

from glm_training.cli.training import main
codes = []
for words in (
    [],
    [],
    ["--resume", "latest", "training.max_steps=2"],
    ["--resume", "auto", "training.max_steps=3"],
    ["--resume", "--overwrite"],
    ["--overwrite"],
):
    sys.argv = ["train.py", "--config", sys.argv[1] if not codes else config, "training.max_steps=1", *words]
    config = sys.argv[2]
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code)
print("codes", codes)
"""


def test_without_fcntl_and_sigusr1(tmp_path):
    done = run("-c", PROGRAM, str(write_config(tmp_path)))
    assert "codes [0, 2, 0, 0, 2, 0]" in done.stdout, done.stdout + done.stderr
    assert "holds a run already" in done.stderr and "give one of the two" in done.stderr
    saved = [
        sorted(path.name for path in (tmp_path / run / "checkpoints").glob("step-*")) for run in ("run.old-1", "run")
    ]
    assert saved == [["step-000001", "step-000002", "step-000003"], ["step-000001"]]
    assert not list(tmp_path.rglob("run.lock"))
