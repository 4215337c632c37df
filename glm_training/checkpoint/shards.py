"""States whose tensors lie in shards over processes: written by all of them in the safetensors files of
torch.distributed.checkpoint, tensors only, and read by any number of processes, each what it needs.

`states/<name>/shard-*.safetensors`: every file holds pieces of tensors and says in its header where they begin.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from glm_training.checkpoint import disk
from glm_training.checkpoint.disk_errors import SaveError
from glm_training.checkpoint.manifest import FileRecord
from glm_training.checkpoint.state_tree import CheckpointError


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileRecord]:
    """What this process holds of `tensors`, synced, into the existing `folder`; a replica is written once. Gives the
    files that this process wrote, by name, as they were in memory. A collective.

    Raises OSError or SaveError on every process where the disk did not take it on one, and what told one to end there.
    """
    writer, files = HuggingFaceStorageWriter(str(folder), save_distributed=True), _Files()
    writer.fs = files
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        own = error.failures.get(rank, (None,))[0]
        if own is not None and not isinstance(own, Exception):
            raise own from error
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        known = next((cause for cause in causes.values() if isinstance(cause, OSError | CheckpointError)), None)
        if known is not None:
            raise known from error
        rank, cause = next(iter(causes.items()))
        raise SaveError(f"rank {rank} could not write its shards: {type(cause).__name__}: {cause}") from error
    return files.records


SAFE = "and the previous checkpoint is untouched"


class _Files(FileSystem):
    """The files of a save, through the seam of all that a checkpoint changes on the disk."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A new file, whose record is kept once the writer, which syncs it, is done."""
        with disk.create_file(Path(path)) as handle:
            stream = _Stream(handle)
            yield stream
        self.records[Path(path).name] = FileRecord(stream.size, stream.sha256.hexdigest())

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """The main process has made the folder. Raises SaveError where this one does not see it."""
        if not Path(path).is_dir():
            raise SaveError(unshared(f"rank {dist.get_rank()} does not see {path}, {SAFE}"))


class _Stream:
    """An open file that knows what it was given."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.size, self.sha256 = handle, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        disk.write(self.handle, data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


def unshared(what: str) -> str:
    """The message about a folder of checkpoints that not all processes see."""
    return (
        f"{what}: a run in shards needs checkpoint.save_dir on a disk that all its processes share. Put it on one, or "
        "use distributed.strategy: ddp"
    )


@dataclass(frozen=True)
class Piece:
    """A block of a saved tensor: where it begins, its shape, and the file that has it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class SavedTensor:
    """A tensor on the disk, in pieces that tile it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The block of `shape` that begins at `start`, on the CPU. Raises CheckpointError for what is not there."""
        block, filled = torch.empty(tuple(shape), dtype=self.dtype), 0
        for piece in self.pieces:
            low = [max(a, b) for a, b in zip(start, piece.start, strict=True)]
            ends = zip(start, shape, piece.start, piece.shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.start, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
            try:
                with safe_open(piece.file, "pt") as file:
                    block[here] = file.get_slice(self.name)[there] if there else file.get_tensor(self.name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{piece.file} cannot be read: {error}") from error
            filled += block[here].numel()
        if filled != block.numel():
            raise CheckpointError(f"{self.name} is not whole: {filled} of {block.numel()} numbers are in the files")
        return block

    def whole(self) -> Tensor:
        """All of it."""
        return self.read([0] * len(self.shape), self.shape)

    def like(self, parameter: Tensor) -> Tensor:
        """Laid out as `parameter` is: on its device, and of a ``DTensor`` this process's shard alone is read."""
        if not isinstance(parameter, DTensor):
            return self.whole().to(parameter.device)
        if self.shape != parameter.shape:
            raise CheckpointError(
                f"{self.name} is {list(self.shape)} in the checkpoint, and {list(parameter.shape)} here"
            )
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = parameter.device_mesh, parameter.placements
        shape, start = compute_local_shape_and_global_offset(self.shape, mesh, placements)
        local = self.read(start, shape).to(parameter.device)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


class _Listed(FileSystem):
    """Files of a folder, and no others that lie there."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


def saved_tensors(folder: Path, names: Iterable[str]) -> dict[str, SavedTensor]:
    """The tensors that `write_shards` left in the files `names` of `folder`, by name; nothing is read but the headers
    of the files."""
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _Listed(names)
    try:
        metadata = reader.read_metadata()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} has no readable shards: {error}") from error
    pieces: dict[str, list[Piece]] = {}
    for index, info in (metadata.storage_data or {}).items():
        piece = Piece(tuple(index.offset or ()), tuple(info.shape), Path(info.relative_path))
        pieces.setdefault(index.fqn, []).append(piece)
    return {
        name: SavedTensor(name, known.size, known.properties.dtype, tuple(pieces[name]))
        for name, known in metadata.state_dict_metadata.items()
    }
