import json
import shutil
from pathlib import Path

import pytest
import torch

from glm_training.checkpoint.commit import begin_run, continue_run, save_checkpoint
from glm_training.checkpoint.manifest import read_manifest, verify_checkpoint
from glm_training.checkpoint.resume import NoCheckpointError, load_checkpoint, resolve_resume
from glm_training.checkpoint.run_record import RunRecord
from glm_training.checkpoint.state_tree import CheckpointError


def save(folder: Path, *steps: int) -> Path:
    for step in steps:
        path = save_checkpoint(
            folder, step, {"s": {"w": torch.full((8,), float(step)), 3: step}}, total_limit=None,
            metadata={"step": step}, extra_dirs={"lora": lambda made: (made / "x.bin").write_bytes(b"123")},
        )  # fmt: skip
    return path


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_load_gives_the_states_back(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 5))
    assert list(loaded) == ["s"] and loaded["s"][3] == 5 and loaded["s"]["w"].eq(5).all()


def test_every_flipped_byte_is_seen(tmp_path):
    path = save(tmp_path, 1)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        whole = file.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 40)):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            # White space of the manifest is not content.
            if not (file.name == "manifest.json" and json_equal(damaged, whole)):
                with pytest.raises(CheckpointError, match=file.name):
                    load_checkpoint(path)
        file.write_bytes(whole)
    verify_checkpoint(path)


def json_equal(left: bytes, right: bytes) -> bool:
    try:
        return json.loads(left) == json.loads(right)
    except ValueError:
        return False


@pytest.mark.parametrize("damage", ["truncate", "remove", "grow"])
def test_sizes_and_missing_files_are_seen(tmp_path, damage):
    file = save(tmp_path, 1) / "states" / "s.safetensors"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "truncate" else file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="states/s.safetensors (has .* bytes instead|cannot be read)"):
        load_checkpoint(tmp_path / "step-000001")


def test_a_manifest_cannot_reach_outside(tmp_path):
    path = save(tmp_path, 1)
    manifest = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(manifest.replace("lora/x.bin", "../lora/x.bin"))
    with pytest.raises(CheckpointError, match="digest differs"):
        verify_checkpoint(path)


def test_latest_follows_the_pointer(tmp_path):
    save(tmp_path, 10, 20, 15)
    point = resolve_resume(tmp_path, "latest")
    assert (point.step, point.path.name, point.skipped) == (15, "step-000015", ())
    assert point.manifest.metadata == {"step": 15}


def test_latest_falls_back_and_names_what_it_skipped(tmp_path):
    save(tmp_path, 10, 20, 30)
    flip_last_byte(tmp_path / "step-000030" / "states" / "s.safetensors")
    (tmp_path / "step-000020" / "manifest.json").unlink()
    point = resolve_resume(tmp_path, "latest")
    assert point.step == 10
    assert [item.path.name for item in point.skipped] == ["step-000030", "step-000020"]
    assert "s.safetensors" in point.skipped[0].reason and "manifest.json" in point.skipped[1].reason


def test_latest_falls_back_to_the_last_made_not_to_an_abandoned_later_step(tmp_path):
    save(tmp_path, 100, 300, 150, 200)
    flip_last_byte(tmp_path / "step-000200" / "states" / "s.json")
    assert resolve_resume(tmp_path, "latest").step == 150


FOLDER, LOOP = "a folder", "a link to itself"


@pytest.mark.parametrize("pointer", [None, "", "../../etc\n", "step-000099\n", b"\xff\xfe", FOLDER, LOOP])
def test_latest_without_a_usable_pointer_is_the_newest(tmp_path, pointer):
    save(tmp_path, 10, 20)
    (tmp_path / "latest").unlink()
    (tmp_path / "ledger.json").unlink()
    if pointer == FOLDER:
        (tmp_path / "latest").mkdir()
    elif pointer == LOOP:
        (tmp_path / "latest").symlink_to("latest")
    elif pointer is not None:
        (tmp_path / "latest").write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    point = resolve_resume(tmp_path, "latest")
    assert point.step == 20
    assert [item.path.name for item in point.skipped] == (["step-000099"] if pointer == "step-000099\n" else [])


def test_nothing_to_resume_is_said(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NoCheckpointError, match="leave resume out"):
            resolve_resume(folder, "latest")


def test_nothing_that_verifies_gives_every_reason(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip_last_byte(tmp_path / f"step-00000{step}" / "lora" / "x.bin")
    with pytest.raises(
        CheckpointError, match=r"(?s)step-000002 is damaged.*step-000001 is damaged.*start anew"
    ) as caught:
        resolve_resume(tmp_path, "latest")
    assert not isinstance(caught.value, NoCheckpointError)


def test_an_explicit_path_never_falls_back(tmp_path):
    save(tmp_path, 1, 2)
    assert resolve_resume(tmp_path, "step-000001").step == 1
    assert resolve_resume(tmp_path, tmp_path / "step-000001").step == 1
    flip_last_byte(tmp_path / "step-000001" / "lora" / "x.bin")
    with pytest.raises(
        CheckpointError, match="step-000001 is damaged: lora/x.bin.*\nName another checkpoint, or latest"
    ):
        resolve_resume(tmp_path, str(tmp_path / "step-000001"))
    with pytest.raises(CheckpointError, match="no checkpoint at step-000003"):
        resolve_resume(tmp_path, "step-000003")
    with pytest.raises(CheckpointError, match="no checkpoint at ~nobody-here/run"):
        resolve_resume(tmp_path, "~nobody-here/run")
    (tmp_path / "step-000004").mkdir()
    with pytest.raises(CheckpointError, match="not a whole checkpoint.*\nName another"):
        resolve_resume(tmp_path, tmp_path / "step-000004")


def test_latest_never_crosses_runs(tmp_path):
    first = begin_run(tmp_path)
    save(tmp_path, 10)
    second = begin_run(tmp_path)
    assert first != second
    with pytest.raises(NoCheckpointError, match=r"step-000010: another run's"):
        resolve_resume(tmp_path, "latest")  # the pointer still names it
    save(tmp_path, 5)
    assert resolve_resume(tmp_path, "latest").manifest.run == second
    flip_last_byte(tmp_path / "step-000005" / "states" / "s.json")
    with pytest.raises(CheckpointError, match="step-000005 is damaged") as caught:
        resolve_resume(tmp_path, "latest")
    assert "step-000010" not in str(caught.value)
    assert resolve_resume(tmp_path, "step-000010").manifest.run == first


def test_a_copy_of_another_run_under_a_name_of_this_one_is_not_its_own(tmp_path):
    begin_run(tmp_path / "other")
    begin_run(tmp_path / "run")
    save(tmp_path / "run", 1, 2)
    shutil.rmtree(tmp_path / "run" / "step-000002")
    shutil.copytree(save(tmp_path / "other", 2), tmp_path / "run" / "step-000002")
    assert resolve_resume(tmp_path / "run", "latest").step == 1


def test_checkpoints_from_before_runs_had_ids_stay_the_runs_that_the_ledger_lists(tmp_path):
    save(tmp_path, 1, 2)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    del ledger["run"]
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    point = resolve_resume(tmp_path, "latest")
    run = continue_run(point.path)
    assert run and point.manifest.run is None
    assert resolve_resume(tmp_path, "latest").step == 2
    assert read_manifest(save(tmp_path, 3)).run == run
    flip_last_byte(tmp_path / "step-000003" / "states" / "s.json")
    assert resolve_resume(tmp_path, "latest").step == 2


def test_a_run_gone_back_goes_on_from_there_until_it_saves(tmp_path):
    run = begin_run(tmp_path)
    save(tmp_path, 4, 8)
    assert continue_run(tmp_path / "step-000004") == run
    assert resolve_resume(tmp_path, "latest").step == 4
    (tmp_path / "latest").unlink()
    assert resolve_resume(tmp_path, "latest").step == 4


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ("run", 2),
        ("run/checkpoints", 2),
        ("run/checkpoints/step-000001", 1),
        ("run/checkpoints/step-000001/lora", 1),
        ("run/checkpoints/step-000001/lora/x.bin", 1),
        ("run/checkpoints/step-000001/manifest.json", 1),
        ("elsewhere", 2),
        ("link", 2),
    ],
)
def test_what_lies_around_or_in_a_checkpoint_is_taken_for_it(tmp_path, given, step):
    save(tmp_path / "run" / "checkpoints", 1, 2)
    (tmp_path / "elsewhere").mkdir()
    RunRecord("r", "now", "../run/checkpoints").write(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "manifest.json").write_text("{}")  # of something else
    point = resolve_resume(tmp_path / "mine", tmp_path / given)
    assert point.step == step
    assert point.path.resolve() == tmp_path / "run" / "checkpoints" / f"step-{step:06d}"


def test_a_folder_without_checkpoints_is_said_to_be_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is neither a checkpoint nor the folder of a run"):
        resolve_resume(tmp_path / "run", tmp_path / "empty")


def test_a_moved_checkpoint_still_loads(tmp_path):
    shutil.move(save(tmp_path / "run", 4), tmp_path / "elsewhere")
    assert load_checkpoint(resolve_resume(tmp_path / "run", tmp_path / "elsewhere").path, verify=False)["s"][3] == 4
