"""A newcomer's way from the first run to a picture of the exported model, as commands in processes of their own, timed:
the steps of `python -m tests.newcomer`, which clones and installs first, in this tree and environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.newcomer import table, walk
from tests.warm import Program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path) -> Path:
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_whole_way(clone):
    def run(program: str, *words: str) -> str:
        module = ("-m", "glm_training.cli.main") if program == "glm-train" else ()
        done = Program(*module, *words, directory=clone, changes={"PYTHONPATH": str(ROOT)}).ended()
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stdout}\n{done.stderr}"
        return done.stdout

    spent: dict[str, float] = {}
    walk(clone, run, spent)
    table(spent)
