"""A checkpoint is held while it is exported: a run at work deletes its older ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from glm_training.checkpoint import disk
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.export.source import ExportError, Source
from glm_training.models.loading import ModelLoadError
from glm_training.utils.folder_lock import in_use


@contextmanager
def held(source: Source, folder: Path, room: int) -> Iterator[Source]:
    """The source, read from links to its files in `folder`, which is removed when the block ends: the disk keeps the
    files until then, whatever their run deletes. Where the disk has no hard links, or not between the two places, the
    files of a run at work are copied there, if that leaves `room` bytes free; else they are read where they lie.

    Raises ExportError where the checkpoint is gone, and says so of whatever fails in the block because of that.
    """
    if folder.exists():  # of an export that was killed
        disk.remove_tree(folder)
    kept = source
    try:
        if _filled(source, folder, os.link) or (
            _copying_helps(source, folder.parent, room) and _filled(source, folder, shutil.copyfile)
        ):
            kept = replace(source, links=folder)
        yield kept
    except Exception as error:
        if not (kept.files / MANIFEST).is_file():
            raise ExportError(
                f"{source.folder} was deleted while it was read, as a run does with its older ones "
                "(checkpoint.save_total_limit): nothing was exported. Try again, with a newer one or the run's name"
            ) from error
        if isinstance(error, (ExportError, ModelLoadError)):  # in the user's words
            raise ExportError(str(error).replace(str(folder), str(source.folder))) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copying_helps(source: Source, place: Path, room: int) -> bool:
    """Whether its run may delete it meanwhile, and `place` has `room` beside a copy."""
    needed = sum(record.size for record in source.manifest.files.values())
    return source.run is not None and in_use(source.run) and disk.free_bytes(place) >= needed + room


def _filled(source: Source, folder: Path, put: Callable[[Path, Path], object]) -> bool:
    """Links or copies all files of a checkpoint into `folder`. False where that cannot be done."""
    try:
        for name in [*source.manifest.files, MANIFEST]:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name == MANIFEST or (source.folder / name).exists():  # what lacks is found by what reads it
                put(source.folder / name, place)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True
