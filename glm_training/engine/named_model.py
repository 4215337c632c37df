"""What a command means by the name of a run or of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from glm_training.checkpoint.commit import POINTER
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.checkpoint.resume import CHECKPOINTS
from glm_training.checkpoint.run_record import RunRecord
from glm_training.models.loading import ModelLoadError
from glm_training.utils.writable import expanded

BEST = "best"
"""File among a run's checkpoints that names its best one in its first line, where one is marked."""


def named_checkpoint(name: str | Path, key: str) -> tuple[Path | None, str, str | None]:
    """The checkpoint that `name` means, what of it is named inside it ("" for all), and a line on which of a run it is:
    its best, where one is marked, or else its newest. None where it has nothing to do with a run. Raises ModelLoadError
    where a pointer or a run names none."""
    path = expanded(name)
    for place in (path, *path.parents):
        if place.name in (POINTER, BEST) and place.is_file():
            inside = path.relative_to(place).as_posix()
            found = _pointed(place, key)
            return found, "" if inside == "." else inside, f"{key} {name} is {found}"
    for place in (path, path.parent):
        if (place / MANIFEST).is_file():
            return place, "" if place == path else path.name, None
    for folder in _places(path):
        steps = sorted(step for step in folder.glob("step-*") if (step / MANIFEST).is_file())
        for pointer, why in ((folder / BEST, "its best"), (folder / POINTER, "its newest")):
            if steps and pointer.is_file() and (found := _pointed(pointer, key)) in steps:
                return found, "", f"{key} {name} is {found}, {why}"
        if steps:
            return steps[-1], "", f"{key} {name} is {steps[-1]}, its newest"
    if RunRecord.read(path) is not None:
        raise ModelLoadError(f"{key} {name} is a run that has saved no checkpoint yet")
    return None, "", None


def _places(folder: Path) -> list[Path]:
    record = RunRecord.read(folder)
    return [folder, folder / CHECKPOINTS, *([] if record is None else [folder / record.checkpoints])]


def _pointed(pointer: Path, key: str) -> Path:
    """The checkpoint that a pointer names."""
    name = pointer.read_text(errors="replace").partition("\n")[0].strip()
    if not name or not (pointer.parent / name / MANIFEST).is_file():
        raise ModelLoadError(f"{key}: {pointer} names {name or 'nothing'}, which is not there; name one yourself")
    return pointer.parent / name
