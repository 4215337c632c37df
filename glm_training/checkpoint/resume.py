"""Finding and reading the checkpoint to resume from."""

import re
from dataclasses import dataclass
from pathlib import Path

from glm_training.checkpoint.commit import CHECKPOINT_NAME, POINTER, REPLACED, STATES
from glm_training.checkpoint.ledger import Ledger, step_of
from glm_training.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify_checkpoint
from glm_training.checkpoint.run_record import RunRecord
from glm_training.checkpoint.shards import SavedTensor, saved_tensors
from glm_training.checkpoint.state_tree import CheckpointError, StateTree, read_tree
from glm_training.utils.writable import expanded

CHECKPOINTS = "checkpoints"
"""Where a run directory has its checkpoints, unless it says otherwise."""

NONE_WHOLE = (
    "Put back what was changed there, or start anew: with another output_dir, or with --overwrite, which sets this run "
    "aside whole"
)

_STEP_FOLDER = re.compile(rf"(^|-){CHECKPOINT_NAME.pattern}$")


class NoCheckpointError(CheckpointError):
    """``latest`` was asked for where no checkpoint was ever committed."""


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that ``latest`` passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint. ``skipped`` names the newer ones that did not verify: show it to the user."""

    path: Path
    manifest: Manifest
    skipped: tuple[SkippedCheckpoint, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps finished when it was made."""
        return self.manifest.step


def resolve_resume(checkpoints_dir: Path, which: str | Path) -> ResumePoint:
    """The verified checkpoint to resume from.

    Args:
        checkpoints_dir: the run's folder of checkpoints.
        which: ``latest``: what the pointer names, else the newest of this run that verifies. A checkpoint's path, its
            name in ``checkpoints_dir``, a link to it or something inside it: that one and no other. The folder of
            another run, or of its checkpoints: what ``latest`` means there.

    Raises:
        NoCheckpointError: ``latest`` where this run has made none.
        CheckpointError: the named one does not verify, or none does; every reason is in the message.
    """
    if str(which) == "latest":
        return _latest(checkpoints_dir)
    path = expanded(which)
    if not path.exists() and len(path.parts) == 1:
        path = checkpoints_dir / path
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {which}; name one, like {checkpoints_dir}/step-000100")
    real = path.resolve()  # a link belongs to the run whose folder it leads to
    whole = [each for each in (real, *real.parents) if each == real or _STEP_FOLDER.search(each.name)]
    found = next((each for each in whole if (each / MANIFEST).is_file()), None)
    if found is not None:
        found = path if found == real and not path.is_symlink() else found
        return ResumePoint(found, _verified(found))
    record = RunRecord.read(path)
    folders = [path, path / CHECKPOINTS, *([] if record is None else [path / record.checkpoints])]
    below = [each for each in folders if holds_checkpoints(each)]
    if below and not CHECKPOINT_NAME.fullmatch(path.name):
        return _latest(below[0])
    if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name):
        _verified(path)  # says what it lacks
    raise CheckpointError(
        f"{path} is neither a checkpoint nor the folder of a run that has some; name one, like "
        f"{checkpoints_dir}/step-000100"
    )


def _verified(named: Path) -> Manifest:
    try:
        return verify_checkpoint(named)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nName another checkpoint, or latest for the newest of its run that is whole"
        ) from error


def holds_checkpoints(folder: Path) -> bool:
    """Whether a checkpoint lies in ``folder``, whole or damaged; one that was never committed is none."""
    return folder.is_dir() and any(
        CHECKPOINT_NAME.fullmatch(path.name.removeprefix(REPLACED)) and path.is_dir() for path in folder.iterdir()
    )


def _latest(checkpoints_dir: Path) -> ResumePoint:
    skipped: list[SkippedCheckpoint] = []
    every = _newest_first(checkpoints_dir)
    for path in own_checkpoints(checkpoints_dir):
        try:
            return ResumePoint(path, verify_checkpoint(path), tuple(skipped))
        except CheckpointError as error:
            skipped.append(SkippedCheckpoint(path, str(error)))
    if not skipped:
        others = ", ".join(path.name for path in every)
        raise NoCheckpointError(
            f"there is no checkpoint of this run in {checkpoints_dir}"
            + (f" ({others}: another run's, name one to begin with it)" if others else "")
            + "; leave resume out to start anew, or write auto, which resumes where it can"
        )
    reasons = "\n".join(f"  {item.reason}" for item in skipped)
    raise CheckpointError(f"no checkpoint in {checkpoints_dir} verifies:\n{reasons}\n{NONE_WHOLE}")


def own_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """The checkpoints of the run that a folder belongs to, whole or damaged: what ``latest`` names, then from the last
    made to the first."""
    return [path for path in _newest_first(checkpoints_dir) if _of_this_run(checkpoints_dir, path)]


def _of_this_run(checkpoints_dir: Path, path: Path) -> bool:
    """Whether the run that the ledger names made the checkpoint at ``path``; what cannot be told counts as its own only
    where the ledger lists it. Without a ledger all are."""
    ledger = Ledger.read(checkpoints_dir)
    if ledger.run is None:
        return True
    try:
        made_by = read_manifest(path).run
    except CheckpointError:
        made_by = None
    return made_by == ledger.run if made_by is not None else path.name.removeprefix(REPLACED) in ledger.names()


def _newest_first(checkpoints_dir: Path) -> list[Path]:
    """What the pointer names, then this run's from the last made, then the others by step."""
    if not checkpoints_dir.is_dir():
        return []
    folders = [path for path in checkpoints_dir.iterdir() if path.is_dir()]
    folders.sort(key=lambda path: step_of(path.name), reverse=True)
    # A save that dies while replacing a checkpoint leaves the earlier one under the prefix.
    present = {path.name.removeprefix(REPLACED): None for path in folders}
    names = [name for name in present if CHECKPOINT_NAME.fullmatch(name)]
    listed = [name for name in reversed(Ledger.read(checkpoints_dir).names()) if name in names]
    pointed = [name] if (name := _pointer(checkpoints_dir)) else []
    candidates: list[Path] = []
    for name in dict.fromkeys([*pointed, *listed, *names]):
        replaced = checkpoints_dir / f"{REPLACED}{name}"
        # The pointer may name a folder that is gone: it is tried, and so named among the skipped.
        if (checkpoints_dir / name).exists() or not replaced.exists():
            candidates.append(checkpoints_dir / name)
        if replaced.exists():
            candidates.append(replaced)
    return candidates


def _pointer(checkpoints_dir: Path) -> str | None:
    try:
        name = (checkpoints_dir / POINTER).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # a folder or a link that leads nowhere points at nothing either
        return None
    return name if CHECKPOINT_NAME.fullmatch(name) else None


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, StateTree]:
    """Every named state of a checkpoint, tensors on the CPU; what lies in shards as `SavedTensor`, still on disk.

    Args:
        path: a checkpoint folder.
        verify: compare every file with the manifest first; False right after :func:`resolve_resume`, which did.

    Raises:
        CheckpointError: naming the files that are missing or damaged.
    """
    manifest = verify_checkpoint(path) if verify else read_manifest(path)
    return {name: load_state(path, name, manifest) for name in manifest.states}


def load_state(path: Path, name: str, manifest: Manifest) -> StateTree:
    """One named state of the checkpoint at ``path``, as :func:`load_checkpoint` gives it; nothing is verified."""
    return read_tree(path / STATES / f"{name}.json", _tensors(path, name, manifest))


def files_of_state(name: str, manifest: Manifest) -> list[str]:
    """The files that a named state of a checkpoint lies in."""
    own = (f"{STATES}/{name}.json", f"{STATES}/{name}.safetensors")
    return [file for file in manifest.files if file in own or file.startswith(f"{STATES}/{name}/")]


def _tensors(path: Path, name: str, manifest: Manifest) -> Path | dict[str, SavedTensor] | None:
    """Where the tensors of a state are: in a file, in shards, or nowhere as it has none."""
    file, folder = f"{STATES}/{name}.safetensors", f"{STATES}/{name}/"
    if file in manifest.files:
        return path / file
    shards = [each.removeprefix(folder) for each in manifest.files if each.startswith(folder)]
    return saved_tensors(path / folder, shards) if shards else None
