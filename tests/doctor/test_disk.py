"""A full disk, a real one of a few MB: what is said, and that its command mends it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_training.doctor import disk
from tests.runs import write_config
from tests.warm import run

CODE = """
import ctypes, json, os, pathlib, subprocess, sys
small, large, config, *overrides = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000) != 0:  # mounts of this process alone
    sys.exit(77)
mounts = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=3m,nr_inodes=64", "tmpfs", small])
mounts += (["-t", "tmpfs", "-o", "size=99t", "tmpfs", large],)  # takes no memory before it is written to
if any(subprocess.run(["mount", *words], capture_output=True).returncode for words in mounts):
    sys.exit(77)
free = os.environ.get("LEFT_FREE")
if free is not None:
    room = os.statvfs(small)
    with open(f"{small}/taken", "wb") as file:
        file.write(b"x" * (room.f_bavail * room.f_frsize - int(free)))
for number in range(int(os.environ.get("NAMES", "0"))):
    try:
        open(f"{small}/{number}", "w").close()
    except OSError:
        break
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_CACHE = os.environ.get("HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE)
from glm_training.doctor import disk
from glm_training.doctor.commands import Asked
asked = Asked((config,) if config else (), tuple(overrides))
found = [*disk.run(asked)] if config else []
found += disk.machine(asked)
print(json.dumps([finding.as_dict() for finding in found]))
print(json.dumps(sorted(name for name in os.listdir(small) if name != "taken" and not name.isdecimal())))
"""


def look(tmp_path: Path, config: str, *overrides: str, **changes: str) -> dict[str, dict[str, Any]]:
    """What is found of the disk where `tmp_path/small` has 3 MB and the home folder 99 TB, whatever this machine's
    disks have; nothing may stay in the small one."""
    small, home = tmp_path / "small", tmp_path / "home"
    small.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    if sys.platform != "linux":
        pytest.skip("mounts a tmpfs of its own")
    done = run("-c", CODE, str(small), str(home), config, *overrides, changes=changes | {"HOME": str(home)})
    if done.returncode == 77:
        pytest.skip("mounts are not permitted here")
    assert done.returncode == 0, done.stderr
    told, left = done.stdout.splitlines()
    assert json.loads(left) == []
    return {finding["name"]: finding for finding in json.loads(told)}


def moved_to(command: str) -> str:
    """The override that a command ends with."""
    assert "glm-train train" in command or "glm_training.cli.main train" in command
    return command.split()[-1]


def test_checkpoints_that_do_not_fit_go_to_a_disk_with_room(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    on_small = f"output_dir={tmp_path / 'small' / 'run'}"
    before = look(tmp_path, config, on_small)["disk for checkpoints"]
    assert before["status"] == "failed" and "2 checkpoints of" in before["message"]
    assert before["facts"]["free"] <= 3 * 2**20 < before["facts"]["needed"]
    override = moved_to(before["command"])
    assert override.startswith("output_dir=/") and str(tmp_path / "small") not in override
    after = look(tmp_path, config, on_small, override)["disk for checkpoints"]
    assert after["status"] == "ok"


def test_the_room_is_that_of_the_checkpoints_to_the_byte(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    words = [f"output_dir={tmp_path / 'small' / 'run'}", "lora.enabled=true", "lora.rank=1", "lora.alpha=1"]
    words += ["checkpoint.save_lora_only=true", "model.component=ar", "checkpoint.save_total_limit=1"]
    needed = look(tmp_path, config, *words)["disk for checkpoints"]["facts"]["needed"]
    page = 4096
    up = -(-needed // page) * page
    for free, status in ((up, "ok"), (up - page, "failed" if needed > up - page else "ok")):
        found = look(tmp_path, config, *words, LEFT_FREE=str(free))["disk for checkpoints"]
        assert found["facts"]["free"] == free and found["status"] == status


def test_a_full_folder_for_temporary_files_is_replaced_by_its_command(tmp_path: Path) -> None:
    before = look(tmp_path, "", TMPDIR=str(tmp_path / "small"), LEFT_FREE="0")["disk for temporary files"]
    assert before["status"] == "failed" and "No space left" in before["message"]
    export, assigned = before["command"].split()
    assert export == "export"
    variable, place = assigned.split("=")
    after = look(tmp_path, "", **{variable: place})["disk for temporary files"]
    assert after["status"] == "ok" and after["facts"]["folder"] == place


def test_a_disk_without_names_left_is_full_too(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    found = look(tmp_path, config, f"output_dir={tmp_path / 'small' / 'run'}", NAMES="100")
    assert found["folder"]["status"] == "failed" and "No space left" in found["folder"]["message"]
    override = moved_to(found["folder"]["command"])
    assert "folder" not in look(tmp_path, config, f"output_dir={tmp_path / 'small' / 'run'}", override, NAMES="100")


def test_weights_have_their_room_counted(tmp_path: Path) -> None:
    small = {"HF_HUB_CACHE": str(tmp_path / "small")}
    found = look(tmp_path, "", **small)["disk for weights"]
    assert "zai-org/GLM-Image takes 36" in found["message"] and found["status"] == "note"
    hub = ["model.name=zai-org/GLM-Image", "model.torch_dtype=bfloat16"]
    config = str(write_config(tmp_path))
    needed = look(tmp_path, config, *hub, **small)["disk for the model"]
    assert needed["status"] == "failed" and 30e9 < needed["facts"]["needed"] < 40e9
    export, assigned = needed["command"].split()
    assert export == "export" and assigned == f"HF_HOME={tmp_path / 'home'}/huggingface"
    home = assigned.removeprefix("HF_HOME=")
    assert look(tmp_path, config, *hub, HF_HUB_CACHE=f"{home}/hub")["disk for the model"]["status"] == "ok"


def test_folders_that_one_may_not_look_into_are_passed_over(tmp_path, monkeypatch):
    """As /boot/efi of most machines, whose folders no other user may even ask for: here names that no disk takes."""
    named = tmp_path / "My Disk"
    named.mkdir()
    odd = os.fsencode(str(named)).replace(b" ", b"\\040")
    mounts = [b"/dev/a /" + b"x" * 300 + b" ext4 rw 0 0", b"/dev/b " + odd + b" ext4 rw 0 0", b"c /\xff ext4 rw 0 0"]
    (tmp_path / "mounts").write_bytes(b"\n".join(mounts) + b"\n")
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mounts")
    assert named in list(disk._places())
    assert disk.free_bytes(tmp_path / ("x" * 300) / "cache") > 0


def test_runs_begin_on_another_disk(tmp_path, monkeypatch):
    """By the shipped configuration where that is, or in another folder."""
    monkeypatch.chdir(tmp_path)
    assert disk._moved(tmp_path / "a b") == ["cd", f"'{tmp_path / 'a b'}'"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").touch()
    words = disk._moved(tmp_path)
    assert "configs/quickstart.yaml" in words and words[-1] == f"output_dir={tmp_path}/runs/quickstart"
