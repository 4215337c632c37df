"""Where a run writes: what cannot be written, or is in the way, is named with its key before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glm_training.engine.errors import SettingsError
from glm_training.engine.places import check_places, place_problems
from glm_training.utils.writable import why_unwritable
from tests.engine.test_run_directory import config_of, files


def test_every_place_that_cannot_be_written_is_named_with_its_key_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    config = config_of(
        tmp_path,
        f"output_dir={tmp_path}/file",
        f"checkpoint.save_dir={tmp_path}/dangling/saves",
        "logging.use_tensorboard=true",
        "logging.log_dir=/sys/events",
        "lora.enabled=true",
        "checkpoint.save_lora=true",
        "checkpoint.lora_dir=/dev/null/lora",
        "training.method=dpo",
        'dpo.cache_dir="/proc/cache"',
    )
    before = files(tmp_path)
    problems = place_problems(config)
    assert [line.partition(": ")[0] for line in problems] == [
        "output_dir", "checkpoint.save_dir", "checkpoint.lora_dir", "logging.log_dir", "dpo.cache_dir",
    ]  # fmt: skip
    for line, reason in zip(problems, ["is a file", "link to", "/dev/null is a device", "/sys", "/proc"], strict=True):
        assert reason in line
    assert files(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before) + 1
    with pytest.raises(SettingsError) as refused:
        check_places(config, is_main=True)
    assert str(refused.value).splitlines() == problems


@pytest.mark.parametrize(
    ("blocked", "named"),
    [
        ("samples", "samples is a file"),
        ("checkpoints", "checkpoints is a file"),
        ("metrics.jsonl/x", "metrics.jsonl is a folder"),
        ("config.yaml/x", "config.yaml is a folder"),
        ("train.log/x", "train.log is a folder"),
        ("run.json/x", "run.json is a folder"),
        ("checkpoints/latest/x", "latest is a folder"),
        ("checkpoints/best/x", "best is a folder"),
        ("checkpoints/ledger.json/x", "ledger.json is a folder"),
    ],
)
def test_what_is_in_the_way_inside_the_run_directory_is_found(tmp_path, blocked, named):
    path = tmp_path / "run" / blocked
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (problem,) = place_problems(config_of(tmp_path))
    assert named in problem


def test_adapters_are_not_copied_into_the_checkpoints(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    copies = ["lora.enabled=true", "checkpoint.save_lora=true", f"checkpoint.lora_dir={tmp_path}/link/checkpoints"]
    (problem,) = place_problems(config_of(tmp_path, *copies))
    assert problem.startswith(f"checkpoint.lora_dir: {tmp_path}/link/checkpoints is checkpoint.save_dir too")


def test_names_that_no_disk_takes_are_found(tmp_path):
    assert "File name too long" in why_unwritable(tmp_path / ("n" * 300) / "run")
    assert "null" in why_unwritable(Path(f"{tmp_path}/a\0b"))
    assert list(tmp_path.iterdir()) == []


def test_places_that_can_be_made_are_fine_and_are_not_made(tmp_path):
    config = config_of(tmp_path, f"output_dir={tmp_path}/a/b/c", f"checkpoint.save_dir={tmp_path}/d/e")
    assert place_problems(config) == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="an administrator may write anywhere")
def test_a_folder_without_permission_is_found(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    (problem,) = place_problems(config_of(tmp_path, f"output_dir={tmp_path}/locked/run"))
    assert "Permission denied" in problem


def test_other_processes_are_asked_for_their_cache_alone(tmp_path):
    (tmp_path / "file").write_text("")
    keys = ["training.use_reward=false", f"output_dir={tmp_path}/file"]
    for key in ("cache.dir", "dpo.cache_dir"):
        assert place_problems(config_of(tmp_path, *keys, f"{key}={tmp_path}/cache"), is_main=False) == []
        (problem,) = place_problems(config_of(tmp_path, *keys, f"{key}=/dev/null/cache"), is_main=False)
        assert problem.startswith(f"{key}: ")
    (problem,) = place_problems(config_of(tmp_path, *keys), is_main=False)
    assert problem.startswith("cache.dir: ")
