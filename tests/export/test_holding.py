"""A run at work deletes its older checkpoints: an export of one goes on, or says why it does not."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from glm_training.checkpoint import disk
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.export import run as export_run
from glm_training.export.holding import held
from glm_training.export.source import ExportError, Source
from glm_training.utils.folder_lock import FolderLock
from tests.export.exporting import exported


def pruned_at(monkeypatch: pytest.MonkeyPatch, moment: str, checkpoint: Path) -> None:
    """The run deletes its checkpoint when an export has come so far."""
    before = getattr(export_run, moment)

    def pruned(*rest: Any) -> Any:
        shutil.rmtree(checkpoint)
        return before(*rest)

    monkeypatch.setattr(export_run, moment, pruned)


@pytest.mark.parametrize("form", ["pipeline", "safetensors"])
def test_a_checkpoint_that_its_run_deletes_meanwhile_is_exported_whole(run, tmp_path, monkeypatch, form):
    copy = shutil.copytree(Source.read(run).folder, tmp_path / "step-000002")
    (tmp_path / ".partial-out/checkpoint").mkdir(parents=True)  # of an export that was killed
    (tmp_path / ".partial-out/checkpoint" / MANIFEST).write_text("{}")
    exported(copy, tmp_path / "whole", form, draw=False)
    pruned_at(monkeypatch, "write", copy)
    exported(copy, tmp_path / "out", form, draw=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    files = [path for path in sorted((tmp_path / "whole").rglob("*.safetensors"))]
    assert files and all(
        path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() for path in files
    )


def no_link(*_: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_without_hard_links_a_checkpoint_of_a_run_at_work_is_copied(run, tmp_path, monkeypatch):
    copy = shutil.copytree(Source.read(run).folder, tmp_path / "step-000002")
    monkeypatch.setattr(os, "link", no_link)
    pruned_at(monkeypatch, "write", copy)
    at_work = FolderLock(run)
    at_work.acquire()
    try:
        exported(copy, tmp_path / "out", "safetensors", draw=False)
    finally:
        at_work.release()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("free", [0, 1])
def test_a_copy_leaves_the_export_its_room(run, tmp_path, monkeypatch, free):
    source = Source.read(run)
    monkeypatch.setattr(os, "link", no_link)
    needed = sum(record.size for record in source.manifest.files.values())
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed + 99 + free)
    with held(source, tmp_path / "checkpoint", 99) as kept:
        assert kept.links is None  # nobody deletes it
    at_work = FolderLock(run)
    at_work.acquire()
    try:
        with held(source, tmp_path / "checkpoint", 100) as kept:
            assert (kept.links is not None) == bool(free)
            assert all((kept.files / name).is_file() for name in source.manifest.files)
    finally:
        at_work.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["held", "write", "scrub_files", "verified"])
def test_without_hard_links_that_it_was_deleted_meanwhile_is_told(run, tmp_path, monkeypatch, moment):
    copy = shutil.copytree(Source.read(run).folder, tmp_path / "step-000002")
    pruned_at(monkeypatch, moment, copy)
    if moment != "held":
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(ExportError, match="step-000002 was deleted while it was read, as a run does.*Try again"):
        exported(copy, tmp_path / "out", "safetensors", draw=False)
    assert list(tmp_path.iterdir()) == []
