import json
import shutil
from pathlib import Path

import pytest
import torch

from glm_training.checkpoint.commit import save_checkpoint
from glm_training.checkpoint.manifest import verify_checkpoint
from glm_training.checkpoint.resume import NoCheckpointError, load_checkpoint, resolve_resume
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


@pytest.mark.parametrize("pointer", [None, "../../etc\n", "step-000099\n", b"\xff\xfe"])
def test_latest_without_a_usable_pointer_is_the_newest(tmp_path, pointer):
    save(tmp_path, 10, 20)
    (tmp_path / "latest").unlink()
    (tmp_path / "ledger.json").unlink()
    if pointer is not None:
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
    with pytest.raises(CheckpointError, match=r"(?s)step-000002 is damaged.*step-000001 is damaged") as caught:
        resolve_resume(tmp_path, "latest")
    assert not isinstance(caught.value, NoCheckpointError)


def test_an_explicit_path_never_falls_back(tmp_path):
    save(tmp_path, 1, 2)
    assert resolve_resume(tmp_path, "step-000001").step == 1
    assert resolve_resume(tmp_path, tmp_path / "step-000001").step == 1
    flip_last_byte(tmp_path / "step-000001" / "lora" / "x.bin")
    with pytest.raises(CheckpointError, match="step-000001 is damaged: lora/x.bin"):
        resolve_resume(tmp_path, str(tmp_path / "step-000001"))
    with pytest.raises(CheckpointError, match="no checkpoint at step-000003"):
        resolve_resume(tmp_path, "step-000003")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        resolve_resume(tmp_path, tmp_path)


def test_a_moved_checkpoint_still_loads(tmp_path):
    shutil.move(save(tmp_path / "run", 4), tmp_path / "elsewhere")
    assert load_checkpoint(resolve_resume(tmp_path / "run", tmp_path / "elsewhere").path, verify=False)["s"][3] == 4
