"""What the operating system may report during a save, told in words; and what may fail once a checkpoint stands."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from glm_training.checkpoint import disk
from glm_training.checkpoint.commit import save_checkpoint
from glm_training.checkpoint.disk_errors import DiskFullError, SaveError, error_code
from glm_training.checkpoint.manifest import verify_checkpoint
from glm_training.checkpoint.resume import resolve_resume
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.utils.failures import begin_telling

WORDS = {
    errno.EIO: "failing",
    errno.EROFS: "read-only",
    errno.EACCES: "permissions",
    errno.EPERM: "permit",
    errno.ENOTDIR: "A file stands where a folder was",
    errno.ESTALE: "mount it again",
    errno.EFBIG: "ulimit -f",
    errno.EMFILE: "ulimit -n",
    errno.ENAMETOOLONG: "shorter",
    errno.ETIMEDOUT: "Mend that",
}


@pytest.fixture(autouse=True)
def told_anew():
    begin_telling()


def save(folder: Path, step: int, limit: int | None = None, **options) -> Path:
    state = {"weights": {"w": torch.full((64,), float(step))}}
    return save_checkpoint(folder, step, state, total_limit=limit, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("code", WORDS, ids=errno.errorcode.get)
def test_an_error_of_the_disk_is_told_in_words_and_leaves_the_checkpoint_before(tmp_path, faulty_disk, code):
    save(tmp_path, 1)
    faulty_disk.error = OSError(code, os.strerror(code), "/disk/some file")
    for die_at in (3, 6, 9):
        faulty_disk.arm(die_at, "half")
        with pytest.raises(SaveError) as caught:
            save(tmp_path, 2)
        assert not isinstance(caught.value, DiskFullError)
        message = str(caught.value)
        assert message.startswith(f"the checkpoint of step 2 cannot be written to /disk/some file: {os.strerror(code)}")
        assert "the previous checkpoint is untouched" in message and WORDS[code] in message
        assert names(tmp_path) == ["latest", "ledger.json", "step-000001"]
    faulty_disk.disarm()
    assert resolve_resume(tmp_path, "latest").step == 1
    save(tmp_path, 2)


def test_a_used_up_quota_says_so(tmp_path, faulty_disk):
    faulty_disk.error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    faulty_disk.arm(6, "half")
    with pytest.raises(DiskFullError, match=r"step 2 needs \d+ bytes.*quota"):
        save(tmp_path, 2)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: save_file({"w": torch.zeros(8)}, folder / "no folder" / "w.safetensors"),
        lambda folder: Tokenizer(models.BPE()).save(str(folder / "no folder" / "tokenizer.json")),
    ],
    ids=["safetensors", "tokenizers"],
)
def test_libraries_in_rust_tell_the_code_as_text(tmp_path, write):
    with pytest.raises(SaveError, match=r"step 2 cannot be written to .*: No such file or directory"):
        save(tmp_path, 2, extra_dirs={"pipeline": write})
    assert names(tmp_path) == []


def test_the_code_is_found_behind_what_a_library_makes_of_it():
    try:
        try:
            raise OSError(errno.EROFS, "Read-only file system", "a/b")
        except OSError as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as wrapped:
        assert error_code(wrapped) == (errno.EROFS, "a/b")
    assert error_code(Exception("No space left on device (os error 28)")) == (errno.ENOSPC, None)
    assert error_code(ValueError("step 28")) == (None, None)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_an_export_that_the_disk_has_torn_is_not_committed(tmp_path, suffix):
    def torn(folder: Path) -> None:
        path = folder / f"model{suffix}"
        save_file({"w": torch.zeros(64)}, path) if suffix == ".safetensors" else path.write_text('{"a": [1, 2]}')
        path.write_bytes(path.read_bytes()[:-3])

    save(tmp_path, 1)
    with pytest.raises(SaveError, match=rf"pipeline/model{suffix} was not written whole"):
        save(tmp_path, 2, extra_dirs={"pipeline": torn})
    assert names(tmp_path) == ["latest", "ledger.json", "step-000001"]


def test_a_file_that_cannot_be_read_back_is_not_pointed_at(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = Path.open

    def failing(self, mode="r", *arguments, **options):
        if mode == "rb" and self.name == "weights.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=r"weights.safetensors cannot be read \(Input/output error\)"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert resolve_resume(tmp_path, "latest").step == 1


# -- once a checkpoint is committed ------------------------------------------------------------------------------------


def operations_after_the_pointer(faulty_disk, folder: Path, **options) -> range:
    """Numbers of the operations of a save that come after the pointer has moved."""
    faulty_disk.disarm()
    save(folder, **options)
    moves = [at for at, args in enumerate(faulty_disk.arguments) if str(args[-1]).endswith("latest")]
    return range(moves[-1] + 2, len(faulty_disk.calls))  # the folder is synced in between


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "the next step"])
def test_what_fails_after_the_commit_is_told_and_the_commit_stands(tmp_path, faulty_disk, caplog, code, step):
    """Old checkpoints that cannot be removed, and a ledger that cannot be rewritten."""
    for number in (1, 2):
        save(tmp_path / "count", number)
    places = operations_after_the_pointer(faulty_disk, tmp_path / "count", step=step, limit=1)
    assert len(places) > 5
    for place in places:
        folder = tmp_path / f"{place}"
        faulty_disk.disarm()
        faulty_disk.error = None
        for number in (1, 2):
            save(folder, number)
        begin_telling()
        caplog.clear()
        faulty_disk.error = OSError(code, os.strerror(code))
        faulty_disk.arm(place, "before")
        final = save(folder, step, limit=1)
        verify_checkpoint(final)
        assert resolve_resume(folder, "latest").path == final
        assert f"removing old checkpoints failed and the run goes on: [Errno {code}]" in caplog.text
        faulty_disk.disarm()
        save(folder, 4, limit=1)
        assert names(folder) == ["latest", "ledger.json", "step-000004"], f"{place}: what was left is removed later"


def test_rubbish_that_cannot_be_removed_does_not_stop_later_saves(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)
    for name in (".removed-step-000000", ".partial-step-000000"):
        (tmp_path / name).mkdir()
    real = disk.remove_tree

    def refusing(path: Path) -> None:
        if path.name.endswith("step-000000"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path)

    monkeypatch.setattr(disk, "remove_tree", refusing)
    assert save(tmp_path, 2, limit=1).is_dir()
    assert save(tmp_path, 3, limit=1).is_dir()
    assert caplog.text.count("removing what earlier saves left failed") == 1


def test_folders_of_file_systems_that_cannot_sync_them(tmp_path, monkeypatch):
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "failing")))
    with pytest.raises(SaveError):
        save(tmp_path, 2)


def test_an_error_of_ours_is_none_of_the_disk(tmp_path):
    def export(folder: Path) -> None:
        raise KeyError("an exporter's own")

    with pytest.raises(KeyError):
        save(tmp_path, 2, extra_dirs={"lora": export})
    with pytest.raises(SaveError, match="step 2 cannot be written.*: header too large; .*Mend that"):
        save(tmp_path, 2, extra_dirs={"lora": lambda folder: (_ for _ in ()).throw(_too_large())})


def _too_large() -> Exception:
    return safetensors.SafetensorError("header too large")
