"""Findings as text: 80 columns, and commands that the shell takes as they stand."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from glm_training.doctor import commands
from glm_training.doctor.commands import Asked, glm_train, pip_install, reinstall
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


@pytest.mark.parametrize(
    ("noted", "again"),
    [
        ({"url": "file:///home/me/my%20clone", "dir_info": {}}, "/home/me/my clone"),
        (
            {"url": "https://host/glm.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "git+https://host/glm.git@abc",
        ),
        ({"url": "https://host/glm_training-0.1.0.zip", "archive_info": {}}, "https://host/glm_training-0.1.0.zip"),
        (None, "glm_training"),
    ],
)
def test_what_is_installed_again_comes_from_where_it_came(tmp_path: Path, monkeypatch, noted, again) -> None:
    """Not from an index which may have none, or another, of its name."""
    told = tmp_path / "glm_training-0.1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: glm_training\nVersion: 0.1.0\n")
    if noted is not None:
        (told / "direct_url.json").write_text(json.dumps(noted))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    assert shlex.split(" ".join(reinstall()))[-2:] == ["--force-reinstall", again]
