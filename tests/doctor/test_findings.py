"""Findings as text: 80 columns, and commands that the shell takes as they stand."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from glm_training.doctor.commands import Asked, glm_train, pip_install
from glm_training.doctor.findings import WIDTH, Finding, failed, note


def test_lines_are_at_most_80_columns_wide() -> None:
    found = failed("disk", "word " * 60 + "\nsecond part " * 20, ["glm-train", "train", *["key.path=value"] * 12])
    assert len(found.lines()) > 5
    assert all(len(line) <= WIDTH for line in found.lines())
    assert found.lines()[0].startswith("FAIL  disk: word")


def test_a_command_that_is_cut_is_the_same_to_the_shell() -> None:
    words = ["printf", "'%s|'", *[shlex.quote(f"a b{number} {'x' * 20}") for number in range(8)]]
    lines = note("x", "y", words).lines()[1:]
    assert len(lines) > 3 and all(len(line) <= WIDTH for line in lines)
    typed = "\n".join(lines).replace("$ ", "", 1)
    told = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True).stdout
    assert told == "".join(f"a b{number} {'x' * 20}|" for number in range(8))


def test_a_failure_without_a_command_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is said of how to mend it"):
        Finding("GPU", "failed", "absent")


def test_what_is_typed_is_quoted() -> None:
    asked = Asked(("my runs/a.yaml",), ("model.name=x y",), "i2i")
    words = shlex.split(" ".join(glm_train("train", asked, "output_dir=/a b")))
    assert words[-6:] == ["--config", "my runs/a.yaml", "--mode", "i2i", "model.name=x y", "output_dir=/a b"]
    assert shlex.split(" ".join(pip_install("diffusers>=0.42")))[-2:] == ["install", "diffusers>=0.42"]
