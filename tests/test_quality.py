"""Lint and types are clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).parents[1]


TYPED_FROM = "2.9"
"""The oldest torch that has all names that the code speaks of, those that it asks for by version too."""


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        pytest.param(
            ["mypy"],
            marks=pytest.mark.skipif(
                Version(torch.__version__) < Version(TYPED_FROM), reason="this torch lacks torch.optim.Muon"
            ),
        ),
    ],
)
def test_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
