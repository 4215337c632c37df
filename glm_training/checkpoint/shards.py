"""States whose tensors lie in shards over processes: written by all of them in the safetensors files of
torch.distributed.checkpoint, tensors only, and read by any number of processes, each what it needs.

`states/<name>/shard-*.safetensors`: every file holds pieces of tensors and says in its header where they begin.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from glm_training.checkpoint.state_tree import CheckpointError


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """What this process holds of `tensors`, into the existing `folder`; a replica is written once. A collective.

    Raises OSError on every process where the disk did not take it on one.
    """
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        known = next((cause for cause in causes if isinstance(cause, OSError)), None)
        raise known or OSError(errno.EIO, f"a process could not write its shards: {causes[0]}") from error


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
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = parameter.device_mesh, parameter.placements
        shape, start = compute_local_shape_and_global_offset(self.shape, mesh, placements)
        local = self.read(start, shape).to(parameter.device)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def saved_tensors(folder: Path) -> dict[str, SavedTensor]:
    """The tensors that `write_shards` left in `folder`, by name; nothing is read but the headers of the files."""
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
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
