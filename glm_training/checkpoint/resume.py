"""Finding and reading the checkpoint to resume from."""

from dataclasses import dataclass
from pathlib import Path

from glm_training.checkpoint.commit import CHECKPOINT_NAME, POINTER, REPLACED, STATES
from glm_training.checkpoint.ledger import Ledger
from glm_training.checkpoint.manifest import Manifest, read_manifest, verify_checkpoint
from glm_training.checkpoint.state_tree import CheckpointError, StateTree, read_tree


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
        which: ``latest``: what the pointer names, else the newest that verifies. A path, or the name of a folder in
            ``checkpoints_dir``, or a link to one: that one and no other.

    Raises:
        NoCheckpointError: ``latest`` where there is none.
        CheckpointError: the named one does not verify, or none does; every reason is in the message.
    """
    if str(which) != "latest":
        path = Path(which)
        if not path.exists() and len(path.parts) == 1:
            path = checkpoints_dir / path
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint at {which}; name one, like {checkpoints_dir}/step-000100")
        if path.is_symlink():
            path = path.resolve()  # it belongs to the run whose folder it lies in
        return ResumePoint(path, verify_checkpoint(path))
    skipped: list[SkippedCheckpoint] = []
    for path in _newest_first(checkpoints_dir):
        try:
            return ResumePoint(path, verify_checkpoint(path), tuple(skipped))
        except CheckpointError as error:
            skipped.append(SkippedCheckpoint(path, str(error)))
    if not skipped:
        raise NoCheckpointError(f"there is no checkpoint in {checkpoints_dir}; leave resume out to start anew")
    reasons = "\n".join(f"  {item.reason}" for item in skipped)
    raise CheckpointError(f"no checkpoint in {checkpoints_dir} verifies:\n{reasons}")


def _newest_first(checkpoints_dir: Path) -> list[Path]:
    """What the pointer names, then this run's from the last made, then the others by step."""
    if not checkpoints_dir.is_dir():
        return []
    folders = sorted((path for path in checkpoints_dir.iterdir() if path.is_dir()), key=_step, reverse=True)
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


def _step(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _pointer(checkpoints_dir: Path) -> str | None:
    try:
        name = (checkpoints_dir / POINTER).read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return name if CHECKPOINT_NAME.fullmatch(name) else None


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, StateTree]:
    """Every named state of a checkpoint, tensors on the CPU.

    Args:
        path: a checkpoint folder.
        verify: compare every file with the manifest first; False right after :func:`resolve_resume`, which did.

    Raises:
        CheckpointError: naming the files that are missing or damaged.
    """
    manifest = verify_checkpoint(path) if verify else read_manifest(path)
    states = {}
    for name in manifest.states:
        tensors = f"{STATES}/{name}.safetensors"
        states[name] = read_tree(path / STATES / f"{name}.json", path / tensors if tensors in manifest.files else None)
    return states
