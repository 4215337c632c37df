import errno
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch

from glm_training.checkpoint import disk
from glm_training.checkpoint.best import Best, read_best
from glm_training.checkpoint.commit import begin_run, continue_run, name_best, save_checkpoint
from glm_training.checkpoint.disk_errors import DiskFullError, SaveError
from glm_training.checkpoint.ledger import Ledger
from glm_training.checkpoint.manifest import digest_file, read_manifest, verify_checkpoint
from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.checkpoint.state_tree import CheckpointError


def state(value: float):
    return {"weights": {"w": torch.full((64,), float(value)), "n": value}, "sampler": {"position": value}}


def save(folder: Path, step: int, value: float | None = None, limit: int | None = None, **options) -> Path:
    return save_checkpoint(folder, step, state(step if value is None else value), total_limit=limit, **options)


def value_in(path: Path) -> float:
    loaded = load_checkpoint(path)
    assert loaded["weights"]["w"].eq(loaded["weights"]["n"]).all()
    assert loaded["sampler"]["position"] == loaded["weights"]["n"]
    return loaded["weights"]["n"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_holds_states_exports_and_metadata(tmp_path):
    def export(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")

    path = save(tmp_path / "new" / "checkpoints", 7, metadata={"world_size": 2, "seed": 3}, extra_dirs={"lora": export})
    assert path.name == "step-000007" and (path.parent / "latest").read_text() == "step-000007\n"
    assert value_in(path) == 7
    manifest = read_manifest(path)
    assert manifest.step == 7 and manifest.metadata == {"world_size": 2, "seed": 3}
    on_disk = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert on_disk == {*manifest.files, "manifest.json"} and "lora/adapter/adapter_config.json" in on_disk
    assert "states/sampler.safetensors" not in on_disk


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["latest", "ledger.json", "step-000003", "step-000004"]
    save(tmp_path, 5)
    assert len(names(tmp_path)) == 5


def best_of(step: int, score: float = 0.5) -> Best:
    return Best(f"step-{step:06d}", step, "eval/total", score, higher_is_better=True)


def test_the_best_is_kept_past_the_limit_until_another_one_is(tmp_path):
    save(tmp_path, 1, limit=2)
    name_best(tmp_path, best_of(1))
    for step in (2, 3, 4):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["best", "latest", "ledger.json", "step-000001", "step-000003", "step-000004"]
    assert (tmp_path / "best").read_text().splitlines()[0] == "step-000001" and value_in(tmp_path / "step-000001") == 1
    assert read_best(tmp_path) == best_of(1)
    name_best(tmp_path, best_of(4, 0.75))
    save(tmp_path, 5, limit=2)
    assert names(tmp_path) == ["best", "latest", "ledger.json", "step-000004", "step-000005"]
    name_best(tmp_path, None)
    assert read_best(tmp_path) is None and "best" not in names(tmp_path)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_killed_anywhere_the_best_is_the_old_one_or_the_new_one_and_whole(tmp_path, faulty_disk, moment):
    """The new one is saved, named, and pushes the old one out with the next save."""

    def go(folder: Path) -> None:
        save(folder, 2, limit=1)
        name_best(folder, best_of(2, 0.75))
        save(folder, 3, limit=1)

    def begun(folder: Path) -> None:
        faulty_disk.disarm()
        save(folder, 1, limit=1)
        name_best(folder, best_of(1))
        faulty_disk.disarm()

    begun(tmp_path / "count")
    go(tmp_path / "count")
    for die_at, operation in enumerate(list(faulty_disk.calls)):
        folder, where = tmp_path / f"{die_at}", f"{operation} number {die_at}, {moment}"
        begun(folder)
        faulty_disk.arm(die_at, moment)
        with pytest.raises(BaseException) as death:  # noqa: B017
            go(folder)
        assert type(death.value).__name__ == "Killed", where
        best = read_best(folder)
        assert best in (best_of(1), best_of(2, 0.75)), where
        assert value_in(folder / best.name) == best.step, where
        faulty_disk.disarm()
        name_best(folder, best_of(1, 0.9) if best.step == 1 else best)
        save(folder, 4, limit=1)
        expected = ["best", "latest", "ledger.json", best.name, "step-000004"]
        assert names(folder) == expected, where


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_best_that_the_disk_does_not_take_leaves_the_one_before(tmp_path, faulty_disk, code):
    faulty_disk.disarm()
    save(tmp_path, 1)
    name_best(tmp_path, best_of(1))
    faulty_disk.error = OSError(code, os.strerror(code))
    for die_at in range(3):  # made, written, synced
        faulty_disk.arm(die_at, "half")
        with pytest.raises(SaveError, match="cannot be written.*every checkpoint is untouched"):
            name_best(tmp_path, best_of(2, 0.75))
        assert read_best(tmp_path) == best_of(1)


def test_what_was_gone_back_behind_is_no_ancestor(tmp_path):
    """Steps 3, 5 and 7 were made before the run went back to 2, and 5 again after it."""
    for step in (1, 2, 3, 5, 7):
        save(tmp_path, step)
    assert Ledger.read(tmp_path).lineage("step-000007") == [f"step-{step:06d}" for step in (7, 5, 3, 2, 1)]
    continue_run(tmp_path / "step-000002")
    assert Ledger.read(tmp_path).lineage("step-000002") == ["step-000002", "step-000001"]
    for step in (4, 5):
        save(tmp_path, step)
    assert Ledger.read(tmp_path).lineage("step-000005") == [f"step-{step:06d}" for step in (5, 4, 2, 1)]
    assert Ledger.read(tmp_path).lineage("step-000009") == []


def test_what_the_run_did_not_make_is_never_deleted(tmp_path):
    other = save(tmp_path / "other", 2)
    run = tmp_path / "run"
    save(run, 1, limit=1)
    (run / "step-000001" / "notes.txt").write_text("the good one")
    os.rename(other, run / "step-000002")
    (run / "step-000000").mkdir()
    save(run, 3, limit=1)
    (run / "best").mkdir()
    save(run, 4, limit=1)
    assert [name for name in names(run) if name.startswith("step")] == [
        "step-000000", "step-000001", "step-000002", "step-000004",
    ]  # fmt: skip
    assert "best" in names(run)


def test_a_fresh_run_in_an_old_folder_does_not_own_what_is_there(tmp_path):
    save(tmp_path, 1, limit=1)
    begin_run(tmp_path)
    save(tmp_path, 2, limit=1)
    save(tmp_path, 3, limit=1)
    assert [name for name in names(tmp_path) if name.startswith("step")] == ["step-000001", "step-000003"]


def test_the_same_step_again_replaces_this_runs_checkpoint(tmp_path):
    save(tmp_path, 1, 10, limit=1)
    path = save(tmp_path, 1, 11, limit=1)
    assert value_in(path) == 11 and names(tmp_path) == ["latest", "ledger.json", "step-000001"]


def test_the_same_step_again_keeps_what_is_not_this_runs(tmp_path, caplog):
    save(tmp_path, 1, 10)
    begin_run(tmp_path)
    path = save(tmp_path, 1, 11)
    assert value_in(path) == 11 and value_in(tmp_path / "kept-1-step-000001") == 10
    assert "kept-1-step-000001" in caplog.text
    (path / "manifest.json").write_text("damaged")
    assert value_in(save(tmp_path, 1, 12)) == 12
    assert (tmp_path / "kept-2-step-000001").exists()


def test_after_going_back_the_new_checkpoints_outlive_the_abandoned_ones(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, limit=3)
    save(tmp_path, 150, limit=1)
    assert names(tmp_path) == ["latest", "ledger.json", "step-000150"]


def test_an_unreadable_ledger_deletes_nothing(tmp_path, caplog):
    save(tmp_path, 1, limit=1)
    (tmp_path / "ledger.json").write_text("[]")
    save(tmp_path, 2, limit=1)
    assert {"step-000001", "step-000002"} <= set(names(tmp_path)) and "will not be deleted" in caplog.text


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_killed_anywhere_a_checkpoint_remains_and_the_next_save_cleans_up(tmp_path, faulty_disk, moment, same_step):
    export = {"lora": lambda folder: (folder / "a.bin").write_bytes(b"abc")}
    faulty_disk.disarm()
    save(tmp_path / "count", 1, limit=1, extra_dirs=export)
    faulty_disk.disarm()
    save(tmp_path / "count", 1 if same_step else 2, limit=1, extra_dirs=export)
    operations = list(faulty_disk.calls)
    assert {"write", "rename", "sync_folder", "remove_tree"} <= set(operations) and len(operations) > 30
    for die_at, operation in enumerate(operations):
        folder = tmp_path / f"{die_at}"
        where = f"{operation} number {die_at}, {moment}"
        faulty_disk.disarm()
        save(folder, 1, 10, limit=1, extra_dirs=export)
        faulty_disk.arm(die_at, moment)
        with pytest.raises(BaseException) as death:  # noqa: B017
            save(folder, 1 if same_step else 2, 20, limit=1, extra_dirs=export)
        assert type(death.value).__name__ == "Killed", where
        point = resolve_resume(folder, "latest")
        assert value_in(point.path) in (10, 20), where
        faulty_disk.disarm()
        save(folder, 3, 30, limit=1, extra_dirs=export)
        assert value_in(resolve_resume(folder, "latest").path) == 30, where
        assert names(folder) == ["latest", "ledger.json", "step-000003"], where


def test_latest_moves_only_to_what_is_whole(tmp_path, faulty_disk):
    """At every moment the pointer names a checkpoint that verifies, or one whose predecessor lies beside it."""
    faulty_disk.disarm()
    save(tmp_path / "count", 1)
    save(tmp_path / "count", 2)
    for die_at in range(len(faulty_disk.calls)):
        folder = tmp_path / f"{die_at}"
        faulty_disk.disarm()
        save(folder, 1)
        faulty_disk.arm(die_at, "before")
        try:
            save(folder, 2)
        except BaseException as death:
            assert type(death).__name__ == "Killed"
        verify_checkpoint(folder / (folder / "latest").read_text().strip())
        assert resolve_resume(folder, "latest").skipped == ()


def test_everything_is_on_the_disk_before_it_is_named(tmp_path, faulty_disk):
    save(tmp_path, 1, extra_dirs={"lora": lambda folder: (folder / "a.bin").write_bytes(b"abc")})
    log = list(zip(faulty_disk.calls, faulty_disk.arguments, strict=True))
    renames = [index for index, (name, _) in enumerate(log) if name == "rename"]
    for index in renames:
        source, target = log[index][1]
        written = {Path(arguments[0].name) for name, arguments in log[:index] if name == "write"}
        synced = {Path(arguments[0].name) for name, arguments in log[:index] if name == "sync_file"}
        assert written <= synced and log[index + 1] == ("sync_folder", (target.parent,))
        if target.name == "step-000001":
            assert source / "lora" / "a.bin" in synced, "what an exporter wrote by itself"
            made = {arguments[0] for name, arguments in log[:index] if name == "make_folder"}
            assert made == {source, source / "states", source / "lora"}
            last_synced = {args[0]: at for at, (name, args) in enumerate(log[:index]) if name == "sync_folder"}
            for at, (name, arguments) in enumerate(log[:index]):
                if name == "create_file" and source in arguments[0].parents:
                    assert last_synced[arguments[0].parent] > at
            assert made <= set(last_synced)
    assert [log[index][1][1].name for index in renames] == ["ledger.json", "step-000001", "latest"]


@pytest.mark.parametrize("name", ["../beside.txt", "states/../../beside.txt", "{root}/beside.txt"])
def test_a_manifest_does_not_vouch_for_what_lies_outside(tmp_path, name):
    path, outside = save(tmp_path, 1), tmp_path / "beside.txt"
    outside.write_text("whole")
    name = name.format(root=tmp_path)
    manifest = read_manifest(path)
    record = digest_file(outside)
    (path / "manifest.json").write_bytes(replace(manifest, files={**manifest.files, name: record}).encoded())
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} lies outside the checkpoint"):
        verify_checkpoint(path)


def save_for_ever(folder: Path, finished) -> None:
    for step in range(1, 10**6):
        save(folder, step, limit=2)
        finished.value = step


def test_kill_minus_nine(tmp_path):
    fork = multiprocessing.get_context("fork")
    for delay in (0.0, 0.003, 0.007):
        finished = fork.Value("i", 0)
        run = fork.Process(target=save_for_ever, args=(tmp_path, finished))
        run.start()
        while finished.value < 3:
            time.sleep(0.001)
        time.sleep(delay)
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        point = resolve_resume(tmp_path, "latest")
        assert value_in(point.path) == point.step >= finished.value and point.skipped == ()


def test_a_full_disk_is_known_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(disk, "create_file", lambda path: pytest.fail("wrote to a full disk"))
    with pytest.raises(DiskFullError, match=r"step 2 needs \d{7} bytes .* has 1000 free.*save_total_limit"):
        save(tmp_path, 2)
    with pytest.raises(DiskFullError, match=r"needs 10\d{9} bytes"):
        save(tmp_path, 2, extra_bytes=10**10)
    assert value_in(resolve_resume(tmp_path, "latest").path) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_gives_its_space_back(tmp_path, faulty_disk, code):
    faulty_disk.error = OSError(code, os.strerror(code))
    faulty_disk.disarm()
    save(tmp_path, 1)
    for die_at in (3, 5, 9):
        faulty_disk.arm(die_at, "half")
        with pytest.raises(DiskFullError, match=r"step 2 needs \d+ bytes"):
            save(tmp_path, 2)
        assert names(tmp_path) == ["latest", "ledger.json", "step-000001"]
    assert value_in(resolve_resume(tmp_path, "latest").path) == 1


def test_a_disk_that_fills_up_in_an_export_is_named(tmp_path):
    def export(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(DiskFullError, match=r"needs \d+ bytes .* plus what its exports take, and"):
        save(tmp_path, 2, extra_dirs={"lora": export})
    assert names(tmp_path) == []


def test_another_error_is_passed_on_and_leaves_nothing(tmp_path):
    def export(folder: Path) -> None:
        raise KeyError("an exporter's own")

    with pytest.raises(KeyError):
        save(tmp_path, 2, extra_dirs={"lora": export})
    with pytest.raises(CheckpointError, match="state 'bad': a holds a builtins.set"):
        save_checkpoint(tmp_path, 1, {"bad": {"a": set()}}, total_limit=None)
    assert names(tmp_path) == []


def test_a_write_that_the_disk_gets_wrong_is_not_pointed_at(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write = disk.write

    def flip(handle, data):
        write(handle, bytes([data[0] ^ 1]) + bytes(data[1:]) if len(data) == 256 else data)

    monkeypatch.setattr(disk, "write", flip)
    with pytest.raises(CheckpointError, match="weights.safetensors has another SHA-256"):
        save(tmp_path, 2)
    assert resolve_resume(tmp_path, "latest").step == 1


def test_arguments_are_checked(tmp_path):
    for options, words in [
        ({"limit": 0}, "save_total_limit is 0"),
        ({"step": -1}, "step is -1"),
        ({"extra_dirs": {"states": lambda folder: None}}, "'states'"),
        ({"extra_dirs": {"../up": lambda folder: None}}, "'../up'"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            save(tmp_path, **({"step": 1} | options))
    assert names(tmp_path) == []


def test_links_are_not_exported(tmp_path):
    with pytest.raises(CheckpointError, match="'link', neither a file nor a folder"):
        save(tmp_path, 1, extra_dirs={"lora": lambda folder: (folder / "link").symlink_to("/etc/hostname")})


def test_nothing_is_pickled(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    json.loads((path / "states" / "weights.json").read_text())


def test_pruning_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(tmp_path, 1, limit=1)
    save(tmp_path, 2, limit=1)
    assert "removed checkpoint step-000001" in caplog.text
