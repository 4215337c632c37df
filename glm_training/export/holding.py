"""A checkpoint is held while it is exported: a run at work deletes its older ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from glm_training.checkpoint import disk
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.export.source import ExportError, Source
from glm_training.models.loading import ModelLoadError


@contextmanager
def held(source: Source, folder: Path) -> Iterator[Source]:
    """The source, read from links to its files in `folder`, which is removed when the block ends: the disk keeps the
    files until then, whatever their run deletes. Where the disk has no hard links, or not between the two places, it is
    read where it lies.

    Raises ExportError where the checkpoint is gone, and says so of whatever fails in the block because of that.
    """
    if folder.exists():  # of an export that was killed
        disk.remove_tree(folder)
    kept = source
    try:
        if _linked(source, folder):
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


def _linked(source: Source, folder: Path) -> bool:
    """Links all files of a checkpoint into `folder`. False where that cannot be done."""
    try:
        for name in [*source.manifest.files, MANIFEST]:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name == MANIFEST or (source.folder / name).exists():  # what lacks is found by what reads it
                os.link(source.folder / name, place)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True
