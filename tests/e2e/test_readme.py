"""Every command of the README runs, shortened; those for a GPU are checked as far as the download."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from glm_training.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = [
    "training.max_steps=1",
    "evaluation.num_eval_samples=2",
    "training.batch_size=1",
    "rollout.num_inference_steps=2",
    "reward.grpo.updates_per_rollout=1",
    "evaluation.samples_per_prompt=1",
]


def commands() -> list[str]:
    """Lines of the README's bash blocks that start a program of ours."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.split(" ")[0] in ("python", "torchrun", "glm-train")]


def run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def as_arguments(command: str) -> list[str]:
    words = shlex.split(command)
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    return [sys.executable, "-m", "glm_training.cli.main", *words[1:]]


def test_the_readme_has_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path):
    arguments = as_arguments(command)
    files = re.findall(r"configs/[\w/]+\.yaml", command)
    if files and "/" in load_config(files).model.name:  # a model of the hub: everything up to its download
        return
    if any(word in ("train.py", "train_ar.py", "train_dit.py") for word in arguments):
        short = SHORT if load_config(files).training.method == "finetune" else SHORT[:2]
        arguments += [*short, f"output_dir={tmp_path}/run"]
        arguments = [word for word in arguments if word != "--resume"]
    if "sample" in arguments:
        arguments += ["--out", str(tmp_path), "--steps", "2"]
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_local_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), link
