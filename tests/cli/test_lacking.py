"""Every command that loads a model says what is wrong with the libraries, before it loads one of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.warm import ROOT

CONFIG, PROMPTS = str(ROOT / "configs/quickstart.yaml"), str(ROOT / "data/benchmarks/text_tiny.jsonl")
COMMANDS = (
    ("train", "--config", CONFIG),
    ("validate", "--config", CONFIG),
    ("sample", "--prompt", "a red circle", "--model", "tiny"),
    ("evaluate", "--suite", "text", "--prompts", PROMPTS, "--model", "tiny", "--out", "text"),
    ("export", "runs/none", "--format", "lora", "--out", "exported"),
)
MAIN = """
import sys
from glm_training.cli.main import main
try:
    main()
finally:
    print("loaded:", *({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""


def told(words: tuple[str, ...], before: os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    """What `glm-train WORDS` says where the packages in `before` stand in front of those that are installed."""
    environment = os.environ | {"PYTHONPATH": f"{before}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.run(command, cwd=before, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_torchvision_of_another_build(tmp_path, words):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    done = told(words, tmp_path)
    assert done.returncode == 1 and done.stdout == "loaded:\n", done.stdout + done.stderr
    assert "does not load beside torch" in done.stderr and "Traceback" not in done.stderr
    assert "pip install --force-reinstall torch torchvision" in done.stderr


def test_an_old_diffusers(tmp_path):
    folder = tmp_path / "diffusers-0.30.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.30.0\n")
    done = told(COMMANDS[2], tmp_path)
    assert done.returncode == 1 and done.stdout == "loaded:\n", done.stdout + done.stderr
    assert "diffusers 0.30.0 is installed (needs >=0.42)" in done.stderr and "pip install -e ." in done.stderr
