"""Where no export may go: the folders of a run, which deletes and replaces what lies among its checkpoints."""

from __future__ import annotations

from pathlib import Path

from glm_training.checkpoint.commit import CHECKPOINT_NAME, PARTIAL, REMOVED, REPLACED
from glm_training.checkpoint.ledger import LEDGER
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.checkpoint.resume import CHECKPOINTS, holds_checkpoints
from glm_training.checkpoint.run_record import RECORD, RunRecord


def place_of_a_run(target: Path) -> str | None:
    """Why `target`, which need not exist, is or becomes a part of what a run keeps; None where it does not."""
    target = target.parent.resolve() / target.name
    if any((target / name).is_file() for name in (RECORD, LEDGER, MANIFEST)):
        return "it is a folder of a run, or a checkpoint"
    for folder in target.parents:
        if (folder / MANIFEST).is_file():
            return f"it lies in the checkpoint {folder}, which would be no longer what was saved, or be deleted with it"
        if _has_checkpoints(folder):
            return f"it lies in {folder}, the checkpoints of a run, which deletes and replaces what it finds there"
        record = RunRecord.read(folder)
        if record is not None and target.is_relative_to((folder / record.checkpoints).resolve()):
            return f"it lies where the run in {folder} saves its checkpoints"
    for place in (target, *target.parents):
        if _is_called_like_a_step(place.name) and _keeps_steps(place.parent):
            return f"{place} is called like a step of the run that {place.parent} is of, which deletes and replaces it"
    return None


def _has_checkpoints(folder: Path) -> bool:
    """Whether a run saves its checkpoints in `folder`; those of old runs have no ledger."""
    return (folder / LEDGER).is_file() or (folder.name == CHECKPOINTS and holds_checkpoints(folder))


def _keeps_steps(folder: Path) -> bool:
    """Whether `folder` is a run's, as that of copies of its adapters, or has checkpoints in it."""
    return (folder / RECORD).is_file() or any((step / MANIFEST).is_file() for step in folder.glob("step-*"))


def _is_called_like_a_step(name: str) -> bool:
    for start in (PARTIAL, REMOVED, REPLACED):
        name = name.removeprefix(start)
    return CHECKPOINT_NAME.fullmatch(name) is not None
