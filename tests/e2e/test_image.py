"""The Dockerfile, as far as it can be judged without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.image import (
    ROOT,
    apt_packages,
    arguments,
    commands,
    copied,
    fill,
    instructions,
    is_sent,
    patterns,
    pip_words,
)

FOUND = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
RULES = patterns((ROOT / ".dockerignore").read_text(encoding="utf-8"))


def test_lines_are_read() -> None:
    text = "# x\nFROM a\nRUN --mount=type=cache,target=/x b \\\n    # no\n    && pip install c==1 'd e'\nCOPY f g /h/\n"
    found = instructions(text)
    assert [each.word for each in found] == ["FROM", "RUN", "COPY"]
    assert commands(found) == [["b"], ["pip", "install", "c==1", "d e"]]
    assert copied(found) == ["f", "g"] and pip_words(found) == [["c==1", "d e"]]


def test_what_is_ignored_is_what_docker_ignores() -> None:
    rules = ["*", "!a", "!b.py", "**/__pycache__", "a/*.log"]
    sent = {path: is_sent(path, rules) for path in ("a/x.py", "a/b/c", "b.py", "c", "a/__pycache__/x", "a/x.log")}
    assert sent == {"a/x.py": True, "a/b/c": True, "b.py": True, "c": False, "a/__pycache__/x": False, "a/x.log": False}
    assert is_sent("a/b/x.log", rules)


def test_nothing_runs_as_root_and_libraries_come_before_code() -> None:
    words = [each.word for each in FOUND]
    last_user = [each.rest for each in FOUND if each.word == "USER"][-1]
    assert last_user not in ("root", "0") and words.index("USER") < words.index("ENTRYPOINT")
    assert any(run[:1] == ["useradd"] and run[-1] == last_user for run in commands(FOUND))
    order = [each.rest for each in FOUND]
    libraries = next(number for number, rest in enumerate(order) if "/tmp/requirements.txt pytesseract" in rest)
    assert libraries < order.index("glm_training glm_training")
    assert "tesseract-ocr" in apt_packages(FOUND) and any("rm -rf /var/lib/apt/lists" in rest for rest in order)


def test_the_python_is_that_of_ci_and_each_version_is_pinned() -> None:
    versions = arguments(FOUND)
    tested = re.search(r"Python (\d+\.\d+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert tested is not None and versions["PYTHON"].startswith(f"{tested[1]}.")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", versions["BASE"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", versions["UV"])
    for words in pip_words(FOUND):
        loose = [word for word in words if not word.startswith(("-", "/", ".")) and "==" not in word]
        assert loose == []


def test_debian_has_the_packages() -> None:
    if shutil.which("apt-cache") is None:
        pytest.skip("no Debian here")
    packages = apt_packages(FOUND)
    told = subprocess.run(["apt-cache", "policy", *packages], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\S+):$", told, flags=re.MULTILINE)
    if not found:
        pytest.skip("apt has no lists here")
    assert found == packages and "Candidate: (none)" not in told


def test_what_is_copied_is_enough_to_train_with_the_tiny_model(tmp_path: Path) -> None:
    fill(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {name.split("/")[0] for name in copied(FOUND)}
    assert not list(tmp_path.rglob("__pycache__")) and not (tmp_path / "tests").exists()
    for name in ("train.py", "configs/recipes/gspo.yaml", "data/t2i/held_out/prompts.txt", "LICENSE"):
        assert (tmp_path / name).is_file(), name
    code = (
        "import glm_training, pathlib\n"
        "from glm_training.config import load_config\n"
        "from glm_training.models.glm_image.loading import check_source\n"
        "config = load_config('configs/quickstart.yaml')\n"
        "check_source(config.model.name)\n"
        "assert config.data.prompts_file.is_file() and config.evaluation.eval_target_images_dir.is_dir()\n"
        "print(pathlib.Path(glm_training.__file__).parents[1])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path)
