"""Shards on the disk: files of tensors and nothing else, read as the manifest lists them, without pickle."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from glm_training.checkpoint import disk
from glm_training.checkpoint.commit import save_checkpoint
from glm_training.checkpoint.disk_errors import SaveError
from glm_training.checkpoint.manifest import FileRecord, digest_file
from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.checkpoint.shards import saved_tensors, write_shards
from glm_training.checkpoint.state_tree import CheckpointError, encode
from tests.faulty_system import FaultySystem, in_child

KEEPS = {"moments": [torch.arange(12.0).reshape(4, 3)], "step": torch.tensor(7), "rule": "adamw", 3: (1.5, None)}
"""A state with all kinds of values."""


def tree() -> dict:
    """`KEEPS`, with a matrix in shards over a group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return KEEPS | {"matrix": distribute_tensor(torch.arange(20.0).reshape(5, 4), mesh, [Shard(0)])}


def saved(folder: Path, step: int = 1) -> None:
    state = {"s": tree()}
    save_checkpoint(
        folder, step, state, total_limit=None,
        write_together=lambda name, place: write_shards(place, encode(state[name], in_shards=True).tensors),
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    assert in_child(tmp_path / "told", lambda: saved(tmp_path) or 0) == 0, (tmp_path / "told").read_text()
    return tmp_path / "step-000001"


def test_a_state_in_shards_comes_back(checkpoint):
    found = load_checkpoint(checkpoint)["s"]
    assert found["rule"] == "adamw" and found[3] == (1.5, None)
    assert torch.equal(found["moments"][0].whole(), KEEPS["moments"][0])
    assert found["step"].whole().item() == 7
    assert torch.equal(found["matrix"].read((1, 2), (3, 2)), torch.arange(20.0).reshape(5, 4)[1:4, 2:])


def test_a_file_of_shards_holds_tensors_and_nothing_else(checkpoint):
    """Its header names each byte after it, and its notes say where pieces begin."""
    assert sorted(path.name for path in (checkpoint / "states").iterdir()) == ["s", "s.json"]
    (file,) = (checkpoint / "states/s").iterdir()
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    notes = header.pop("__metadata__")
    spans = sorted(tensor["data_offsets"] for tensor in header.values())
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(data) - 8 - length
    assert set(notes) == {"DCP_SHARDING_INFO", "DCP_VERSION", "format"}
    assert {key: set(value) for key, value in json.loads(notes["DCP_SHARDING_INFO"]).items()} == {
        name: {"saved_offsets"} for name in header
    }


def test_a_shard_and_its_folder_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path):
    def save() -> int:
        with FaultySystem(tmp_path, lambda *_: None).interposed() as system:
            saved(tmp_path)
        print(json.dumps(system.operations))
        return 0

    assert in_child(tmp_path / "told", save) == 0, (tmp_path / "told").read_text()
    changes = [tuple(each) for each in json.loads((tmp_path / "told").read_text().splitlines()[-1])]
    folder = ".partial-step-000001/states/s"
    shard = f"{folder}/shard-00001-model-00001-of-00001.safetensors"
    order = [("mkdir", folder), ("open", shard), ("write", shard), ("fsync", shard), ("fsync", folder)]
    places = [changes.index(each) for each in (*order, ("replace", "step-000001"))]
    assert places == sorted(places) and changes.count(("write", shard)) == 1


def test_nothing_is_unpickled(checkpoint):
    class Trap:
        def __reduce__(self):
            return print, ("unpickled",)

    for name in (".metadata", "trap.distcp"):
        (checkpoint / "states/s" / name).write_bytes(pickle.dumps(Trap()))

    def load() -> int:
        def audit(event: str, arguments: tuple) -> None:
            if event == "pickle.find_class":
                raise AssertionError(f"pickle looks for {arguments}")

        sys.addaudithook(audit)
        with pytest.raises(AssertionError, match="pickle looks for"):
            pickle.loads(pickle.dumps(Trap()))
        for tensor in saved_tensors(checkpoint / "states/s", [path.name for path in shards(checkpoint)]).values():
            tensor.whole()
        load_checkpoint(resolve_resume(checkpoint.parent, "latest").path)
        return 0

    assert in_child(checkpoint.parent / "told", load) == 0, (checkpoint.parent / "told").read_text()
    assert "unpickled" not in (checkpoint.parent / "told").read_text()


def shards(checkpoint: Path) -> list[Path]:
    return sorted((checkpoint / "states/s").glob("*.safetensors"))


def test_a_file_that_the_manifest_does_not_list_is_not_read(checkpoint):
    where = {"DCP_SHARDING_INFO": json.dumps({"matrix": {"saved_offsets": [0, 0]}})}
    for name in ("a-stray.safetensors", "shard-00009-model-00001-of-00001.safetensors"):
        save_file({"matrix": torch.zeros(9, 4)}, checkpoint / "states/s" / name, metadata=where)
    assert torch.equal(load_checkpoint(checkpoint)["s"]["matrix"].whole(), torch.arange(20.0).reshape(5, 4))


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_a_truncated_shard_is_named(checkpoint, kept):
    (file,) = shards(checkpoint)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=str(checkpoint / "states/s")):
        saved_tensors(checkpoint / "states/s", [file.name])


def test_a_tensor_of_another_shape_is_refused(checkpoint):
    """One row would go to all rows of a matrix."""

    def load() -> int:
        tree()
        mesh = init_device_mesh("cpu", (1,))
        found = load_checkpoint(checkpoint)["s"]["matrix"]
        same, other = (DTensor.from_local(torch.zeros(rows, 4), mesh, [Shard(0)]) for rows in (5, 6))
        assert torch.equal(found.like(same).to_local(), torch.arange(20.0).reshape(5, 4))
        with pytest.raises(CheckpointError, match=r"matrix is \[5, 4\] in the checkpoint, and \[6, 4\] here"):
            found.like(other)
        return 0

    assert in_child(checkpoint.parent / "told", load) == 0, (checkpoint.parent / "told").read_text()


FAULTS = {
    "lost": (lambda file: file.unlink(), "rank 0 does not see .*, which another process wrote, and"),
    "short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "was not written whole .* the previous"),
    "changed": (lambda file: file.write_bytes(b"\0" * file.stat().st_size), "has another SHA-256 than when it was"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_disk_makes_of_a_shard_is_seen_before_the_checkpoint_counts(checkpoint, fault):
    """The digests are of what processes had in memory."""
    folder, (damage, words) = checkpoint.parent, FAULTS[fault]

    def save() -> int:
        state = {"s": tree()}

        def write(name: str, place: Path) -> dict[str, FileRecord]:
            written = write_shards(place, encode(state[name], in_shards=True).tensors)
            assert written == {file.name: digest_file(file) for file in place.iterdir()}
            damage(next(place.iterdir()))
            return written

        with pytest.raises(CheckpointError, match=words):
            save_checkpoint(folder, 2, state, total_limit=None, write_together=write)
        saved(folder, 3)
        return 0

    assert in_child(folder / "told", save) == 0, (folder / "told").read_text()
    assert resolve_resume(folder, "latest").step == 3
    assert not list(folder.glob(".partial-*"))


def test_a_folder_that_a_process_does_not_see_is_not_made(tmp_path):
    def save() -> int:
        state = {"s": tree()}
        with pytest.raises(
            SaveError, match="rank 0 does not see .*/elsewhere, and the previous .* all its processes share"
        ):
            write_shards(tmp_path / "elsewhere", encode(state["s"], in_shards=True).tensors)
        return 0

    assert in_child(tmp_path / "told", save) == 0, (tmp_path / "told").read_text()
    assert not (tmp_path / "elsewhere").exists()


def test_who_is_told_to_end_while_it_writes_ends(tmp_path, monkeypatch):
    def save() -> int:
        state = {"s": tree()}

        def ended(handle, data):
            raise SystemExit(130)

        monkeypatch.setattr(disk, "write", ended)
        with pytest.raises(SystemExit) as end:
            write_shards(tmp_path, encode(state["s"], in_shards=True).tensors)
        return end.value.code

    assert in_child(tmp_path / "told", save) == 130, (tmp_path / "told").read_text()
