"""Libraries of other versions, and extras: what is said, and that its command mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

CODE = """
import json
from glm_training.doctor.installed import extras, installed
print(json.dumps([finding.as_dict() for finding in [*installed(), *extras(["lion", "wandb"])]]))
"""


def wheel(folder: Path, name: str, version: str) -> None:
    """A package with nothing in it but its version."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{name}/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def environment(tmp_path: Path) -> dict[str, str]:
    first = f"{tmp_path / 'first'}{os.pathsep}{os.environ.get('PYTHONPATH', Path(__file__).parents[2])}"
    own = {"PYTHONPATH": first, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return inherited | own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def found(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """By name."""
    done = subprocess.run([sys.executable, "-P", "-c", CODE], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_an_old_diffusers_before_the_environments_own_is_mended_by_its_command(tmp_path: Path) -> None:
    for version in ("0.30.0", "0.42.1"):
        wheel(tmp_path, "diffusers", version)
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "first"), "diffusers==0.30.0"]
    subprocess.run(install, env=environment(tmp_path), check=True)
    before = found(tmp_path)["diffusers"]
    assert before["status"] == "failed" and "0.30.0 is installed (needs >=0.42)" in before["message"]
    assert f"--upgrade --target {tmp_path / 'first'} 'diffusers>=0.42'" in before["command"]
    done = subprocess.run(["bash", "-c", before["command"]], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "first").glob("*.dist-info")] == ["diffusers-0.42.1.dist-info"]
    after = found(tmp_path)
    assert "diffusers" not in after and "diffusers 0.42.1" in after["libraries"]["message"]


def test_an_extra_that_is_absent_has_the_command_that_installs_it(tmp_path: Path) -> None:
    seen = found(tmp_path)
    assert seen["extra lion"]["status"] == "ok" and "the optimizer lion" in seen["extra lion"]["message"]
    if "extra wandb" not in seen:
        assert seen["wandb"]["message"] == "is not installed (needs >=0.27), for logging.use_wandb"
        assert seen["wandb"]["command"].endswith("-m pip install 'wandb>=0.27'")


def test_a_missing_extra_of_the_environment_goes_where_pip_puts_it(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    wheel(tmp_path, "lion_pytorch", "0.1.0")
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "first"), "lion_pytorch==0.1.0"]
    subprocess.run(install, env=environment(tmp_path), check=True)
    old = found(tmp_path)["lion-pytorch"]
    assert "0.1.0 is installed (needs >=0.2.2), for the optimizer lion" in old["message"]
    assert f"--target {tmp_path / 'first'}" in old["command"]
