"""Folders of a run that are named by a step, ``samples/step-000100``."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")


def step_folder(root: Path, step: int) -> Path:
    """Where a run keeps what belongs to a step."""
    return root / f"step-{step:06d}"


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The folders `step-000100` in `folder`, by their steps."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if path.is_dir())


def discarded(folder: Path) -> Path:
    """Where steps of `folder` go that the run does again: beside it, on the disk that it is on."""
    return folder.resolve().with_name(f"{folder.resolve().name}.discarded")


def keep_folders_until(folder: Path, step: int) -> None:
    """Leaves the folders up to `step`; the others are `discarded`, where each one keeps its name, or has `.2` behind it
    if that is taken. Raises OSError."""
    for own, path in step_folders(folder):
        if own > step:
            aside = discarded(folder)
            aside.mkdir(exist_ok=True)
            names = (path.name if number == 1 else f"{path.name}.{number}" for number in count(1))
            path.rename(next(aside / name for name in names if not os.path.lexists(aside / name)))
