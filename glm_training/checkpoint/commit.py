"""Writing checkpoints so that no crash, kill or full disk can take the previous one.

``step-000100`` is written as ``.partial-step-000100``: states, exports, then ``manifest.json`` with the size and
SHA-256 of every file. All of it is fsynced, renamed, read back and compared; only then does the pointer file ``latest``
move. Last, checkpoints past the limit are deleted, if ``ledger.json`` says that this run made them and nobody added to
them, and ``best`` does not name them.
"""

import errno
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from glm_training.checkpoint import disk
from glm_training.checkpoint.best import BEST, Best, read_best
from glm_training.checkpoint.disk_errors import SaveError, naming_disk_errors, remedy_for
from glm_training.checkpoint.ledger import LEDGER, Ledger, LedgerEntry
from glm_training.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    digest_file,
    read_manifest,
    verify_checkpoint,
)
from glm_training.checkpoint.shards import SAFE, unshared
from glm_training.checkpoint.state_tree import (
    CheckpointError,
    EncodedTree,
    StateTree,
    encode,
    lies_in_shards,
    structure_bytes,
)
from glm_training.utils.failures import beside_training
from glm_training.utils.tensor_file import tensor_file_chunks

logger = logging.getLogger(__name__)

POINTER = "latest"
STATES = "states"
CHECKPOINT_NAME = re.compile(r"step-\d{6,}")
PARTIAL, REMOVED, REPLACED = ".partial-", ".removed-", ".replaced-"
PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
LOSES = "The disk loses what it is given: look at the system's log, or move checkpoint.save_dir elsewhere"
SLACK_BYTES = 1 << 20  # folders, manifest, pointer and ledger


@dataclass(frozen=True)
class _State:
    """A named state on its way to disk."""

    name: str
    tree: EncodedTree
    structure: bytes
    in_shards: bool

    @property
    def size(self) -> int:
        return len(self.structure) + self.tree.tensor_bytes


def checkpoint_name(step: int) -> str:
    """``step-000100`` for step 100."""
    return f"step-{step:06d}"


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    state: Mapping[str, StateTree],
    *,
    total_limit: int | None,
    metadata: Mapping[str, Any] | None = None,
    extra_dirs: Mapping[str, Callable[[Path], None]] | None = None,
    extra_bytes: int = 0,
    write_together: Callable[[str, Path], Mapping[str, FileRecord]] | None = None,
) -> Path:
    """Commit a checkpoint, point ``latest`` at it, and delete this run's checkpoints past the limit.

    Called on the main process alone; the others wait, and write their shards of what lies in shards.

    Args:
        checkpoints_dir: the folder of checkpoints, made if absent.
        step: the number of finished optimizer steps. A checkpoint of that step is replaced if this run made it, and
            moved aside under a ``kept-`` name otherwise.
        state: named state trees; a name becomes ``states/<name>.json`` and ``states/<name>.safetensors``.
        total_limit: how many of this run's checkpoints to keep, at least 1, besides its best; None keeps all.
        metadata: JSON values kept in the manifest beside the run's id, readable without the tensors.
        extra_dirs: folder name -> function that fills the given empty folder, for adapter or pipeline exports.
        extra_bytes: about how much ``extra_dirs`` will write, for the check of free space.
        write_together: has all processes write their shards of a named state into a folder, and gives the files of
            all, as they were in memory; raises OSError and SaveError.

    Returns:
        The committed folder.

    Raises:
        DiskFullError, SaveError: before or while writing; what was written is removed, and the previous checkpoint is
            as it was. Once the new one is committed nothing is raised: what then fails is told.
        CheckpointError: for a value that cannot be stored, naming its place.
    """
    extras = dict(extra_dirs or {})
    _check_arguments(step, total_limit, state, extras)
    states = [_encode_state(name, tree, write_together is not None) for name, tree in state.items()]
    run = Ledger.read(checkpoints_dir).run
    kept = {**(metadata or {}), **({} if run is None else {"run": run})}
    needed = sum(item.size for item in states) + extra_bytes + SLACK_BYTES
    unknown = bool(extras) and not extra_bytes
    with naming_disk_errors(step, needed, unknown, checkpoints_dir):
        if not checkpoints_dir.is_dir():
            checkpoints_dir.mkdir(parents=True)
            disk.sync_folder(checkpoints_dir.parent)
        _tidy(checkpoints_dir)
        if disk.free_bytes(checkpoints_dir) < needed:
            raise OSError(errno.ENOSPC, "not enough free space")
        partial = checkpoints_dir / f"{PARTIAL}{checkpoint_name(step)}"
        with ExitStack() as undo:
            undo.callback(_discard, partial)
            _write_partial(partial, step, states, kept, extras, write_together)
            final = _publish(partial, checkpoints_dir / checkpoint_name(step))
            undo.pop_all()
    if total_limit is not None:
        with beside_training("removing old checkpoints"):
            _prune(checkpoints_dir, total_limit)
    return final


def name_best(checkpoints_dir: Path, best: Best | None) -> None:
    """From here on ``best`` names a checkpoint that was committed; with None there is no such file. Called on the main
    process alone. Raises SaveError, with ``best`` as it was."""
    try:
        if best is not None:
            _write_atomically(checkpoints_dir / BEST, best.encoded())
        elif read_best(checkpoints_dir) is not None:
            disk.remove_file(checkpoints_dir / BEST)
            disk.sync_folder(checkpoints_dir)
    except OSError as error:
        named = "that none is the best" if best is None else f"the best checkpoint, of step {best.step}"
        told = f"{checkpoints_dir / BEST}, which tells {named}, cannot be written: {error.strerror or error}"
        raise SaveError(f"{told}; every checkpoint is untouched. {remedy_for(error.errno)}") from error


def begin_run(checkpoints_dir: Path, run: str | None = None) -> str:
    """A run begins here that continues none of this folder: checkpoints already in it are not its own, and stay.

    Called by the main process before training, and with the `run` that it is where a run has lost the folder on the
    way; the folder is made if absent. Returns the id of the run, which its checkpoints will carry.
    """
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    run = run or _new_run_id()
    _write_atomically(checkpoints_dir / LEDGER, Ledger(run=run).encoded())
    return run


def continue_run(checkpoint: Path) -> str:
    """The run of the folder that ``checkpoint`` lies in goes on after it, and owns what it made. Returns its id.

    From here on ``latest`` means that checkpoint, the last one or one gone back to: a run that dies before its next
    save goes on from there again.
    """
    checkpoints_dir, name = checkpoint.parent, checkpoint.name.removeprefix(REPLACED)
    ledger = Ledger.read(checkpoints_dir)
    run = ledger.run or read_manifest(checkpoint).run or _new_run_id()
    entries = [entry for entry in ledger.entries if entry.name != name]
    entries += [entry for entry in ledger.entries if entry.name == name]
    _write_atomically(checkpoints_dir / LEDGER, Ledger(tuple(entries), run).encoded())
    if CHECKPOINT_NAME.fullmatch(name):
        _write_atomically(checkpoints_dir / POINTER, f"{name}\n".encode("ascii"))
    return run


def _new_run_id() -> str:
    """When it began, to be read by people, and chance enough that no two runs share it."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"


def _check_arguments(
    step: int, total_limit: int | None, state: Mapping[str, StateTree], extras: Mapping[str, Callable[[Path], None]]
) -> None:
    if step < 0:
        raise CheckpointError(f"step is {step}; it counts finished steps and cannot be negative")
    if total_limit is not None and total_limit < 1:
        raise CheckpointError(f"checkpoint.save_total_limit is {total_limit}; keep at least 1, or null for all")
    for name in (*state, *extras):
        if not PART_NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} cannot name a part of a checkpoint; use letters, digits, '_', '-' and '.'")
    if STATES in extras or MANIFEST in extras:
        raise CheckpointError(f"an extra folder cannot be called {STATES!r} or {MANIFEST!r}: the checkpoint uses them")


def _encode_state(name: str, tree: StateTree, may_be_in_shards: bool) -> _State:
    try:
        encoded = encode(tree, in_shards=may_be_in_shards)
    except CheckpointError as error:
        raise CheckpointError(f"state {name!r}: {error}") from None
    return _State(name, encoded, structure_bytes(encoded), lies_in_shards(encoded))


def _discard(partial: Path) -> None:
    """Give the space of a failed save back; what cannot be removed now is removed by the next save."""
    try:
        if partial.exists():
            disk.remove_tree(partial)
    except OSError as error:
        logger.warning("could not remove %s: %s", partial, error)


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    sha256, size = hashlib.sha256(), 0
    with disk.create_file(path) as handle:
        for chunk in chunks:
            disk.write(handle, chunk)
            sha256.update(chunk)
            size += len(chunk)
        disk.sync_file(handle)
    return FileRecord(size, sha256.hexdigest())


def _write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file in one step: readers see the old content or the new, never a part."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    _write_file(fresh, [data])
    disk.rename(fresh, path)
    disk.sync_folder(path.parent)


def _write_partial(
    partial: Path,
    step: int,
    states: Sequence[_State],
    metadata: Mapping[str, Any],
    extras: Mapping[str, Callable[[Path], None]],
    write_together: Callable[[str, Path], Mapping[str, FileRecord]] | None,
) -> None:
    """Everything of a checkpoint but its name, on the disk when this returns."""
    files: dict[str, FileRecord] = {}
    disk.make_folder(partial)
    disk.make_folder(partial / STATES)
    for state in states:
        name = f"{STATES}/{state.name}.json"
        files[name] = _write_file(partial / name, [state.structure])
        if state.in_shards and write_together is not None:
            folder = partial / STATES / state.name
            disk.make_folder(folder)
            files |= _settle_shards(partial, folder, write_together(state.name, folder))
        elif state.tree.tensors:
            name = f"{STATES}/{state.name}.safetensors"
            files[name] = _write_file(partial / name, tensor_file_chunks(state.tree.tensors))
    disk.sync_folder(partial / STATES)
    for name, fill in extras.items():
        disk.make_folder(partial / name)
        fill(partial / name)
        files |= _settle_extra(partial, partial / name)
    manifest = Manifest(step, tuple(state.name for state in states), metadata, files)
    _write_file(partial / MANIFEST, [manifest.encoded()])
    disk.sync_folder(partial)


def _settle_shards(partial: Path, folder: Path, written: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Looks for what all processes have written and synced. What is in the files is compared when they have their
    name."""
    for name, record in written.items():  # by name: a network file system may list a folder as it was
        if not (folder / name).is_file():
            raise SaveError(unshared(f"rank 0 does not see {folder / name}, which another process wrote, {SAFE}"))
        with (folder / name).open("rb") as handle:
            found = handle.seek(0, os.SEEK_END)
        if found != record.size:
            raise SaveError(_torn(partial, folder / name, f"{found} of {record.size} bytes"))
    disk.sync_folder(folder)
    return {(folder / name).relative_to(partial).as_posix(): record for name, record in written.items()}


def _settle_extra(partial: Path, folder: Path) -> dict[str, FileRecord]:
    """Fsync and digest what an exporter wrote."""
    files: dict[str, FileRecord] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise CheckpointError(f"the export {folder.name!r} made {path.name!r}, neither a file nor a folder")
        if path.is_file():
            with path.open("rb") as handle:
                disk.sync_file(handle)
            _check_export(partial, path)
            files[path.relative_to(partial).as_posix()] = digest_file(path)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        disk.sync_folder(path)
    return files


def _check_export(partial: Path, path: Path) -> None:
    """Opens what an exporter wrote: the digest of a torn file would vouch for it, since only the disk has its bytes."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (SafetensorError, ValueError) as error:
        raise SaveError(_torn(partial, path, str(error))) from error


def _torn(partial: Path, path: Path, found: str) -> str:
    return f"{path.relative_to(partial)} was not written whole ({found}); the previous checkpoint is untouched. {LOSES}"


def _publish(partial: Path, final: Path) -> Path:
    """Give a fully written checkpoint its name, verify it there, and move the pointer."""
    parent = final.parent
    ledger = Ledger.read(parent)
    replaced = parent / f"{REPLACED}{final.name}"
    if final.exists() and ledger.made(final, final.name):
        disk.rename(final, replaced)
    elif final.exists():
        _set_aside(final)
    # Listed before it exists: a death between the two leaves an entry without a folder, not a folder never deleted.
    entry = LedgerEntry(final.name, digest_file(partial / MANIFEST).sha256)
    _write_atomically(parent / LEDGER, ledger.adding(entry).encoded())
    disk.rename(partial, final)
    disk.sync_folder(parent)
    try:
        verify_checkpoint(final)
    except CheckpointError as error:
        raise SaveError(f"{error}; the previous checkpoint is untouched. {LOSES}") from error
    _write_atomically(parent / POINTER, f"{final.name}\n".encode("ascii"))
    with beside_training("removing old checkpoints"):  # the new one stands
        if replaced.exists():
            disk.remove_tree(replaced)
    return final


def _set_aside(folder: Path) -> None:
    """Keep what stands where a checkpoint belongs and is not this run's, or no longer what this run wrote."""
    kept = next(path for number in count(1) if not (path := folder.with_name(f"kept-{number}-{folder.name}")).exists())
    disk.rename(folder, kept)
    logger.warning("%s was not what this run wrote there; it is kept as %s", folder, kept.name)


def _tidy(checkpoints_dir: Path) -> None:
    """Finish or undo what a killed save left."""
    for path in sorted(checkpoints_dir.iterdir()):
        for prefix in (PARTIAL, REMOVED):
            if path.name.startswith(prefix) and CHECKPOINT_NAME.fullmatch(path.name.removeprefix(prefix)):
                with beside_training("removing what earlier saves left"):
                    disk.remove_tree(path)
        if path.name.startswith(REPLACED) and CHECKPOINT_NAME.fullmatch(path.name.removeprefix(REPLACED)):
            _settle_replaced(path, checkpoints_dir / path.name.removeprefix(REPLACED))


def _settle_replaced(replaced: Path, final: Path) -> None:
    try:
        verify_checkpoint(final)
    except CheckpointError:
        if final.exists():
            _set_aside(final)
        disk.rename(replaced, final)
    else:
        with beside_training("removing what earlier saves left"):
            disk.remove_tree(replaced)


def _prune(checkpoints_dir: Path, total_limit: int) -> None:
    """Delete this run's oldest checkpoints past the limit, but its best; the newest has just been verified."""
    ledger, best = Ledger.read(checkpoints_dir), read_best(checkpoints_dir)
    ours = [name for name in ledger.names() if ledger.made(checkpoints_dir / name, name)]
    for name in ours[:-total_limit]:
        if best is not None and name == best.name:
            continue
        # Renamed first: a death half-way leaves a folder that is clearly rubbish, not a damaged checkpoint.
        removed = checkpoints_dir / f"{REMOVED}{name}"
        disk.rename(checkpoints_dir / name, removed)
        disk.remove_tree(removed)
        logger.info("removed checkpoint %s: past the limit of %d", name, total_limit)
    kept = tuple(entry for entry in ledger.entries if (checkpoints_dir / entry.name).exists())
    if kept != ledger.entries:
        _write_atomically(checkpoints_dir / LEDGER, Ledger(kept, ledger.run).encoded())
