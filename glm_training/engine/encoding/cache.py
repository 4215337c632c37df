"""Frozen encoders run once per image and prompt: what they give, on disk under a name made of its content.

A key is the SHA-256 of everything that the tensors depend on (what was encoded, with which weights, how), so runs may
share a folder, a moved image is found again and a changed one is not. Files are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from glm_training.engine.errors import TrainingError
from glm_training.utils.failures import beside_training
from glm_training.utils.tensor_file import tensor_file_chunks

MEMORY_BYTES = 1 << 30
"""Encoded tensors that are held in memory, the most recently used ones."""

STALE_SECONDS = 24 * 3600.0
"""Age at which a half-written file is nobody's any more."""

FORMAT = "1"
_PARTIAL = ".partial-"


def content_key(kind: str, **facts: Any) -> str:
    """A file name (hex) of `kind` and facts that JSON can hold; the order of the facts does not matter."""
    return hashlib.sha256(json.dumps([FORMAT, kind, facts], sort_keys=True).encode()).hexdigest()


def weights_fingerprint(modules: Iterable[nn.Module], *facts: Any) -> str:
    """SHA-256 (hex) of all weights and buffers of `modules`, bit for bit with names and dtypes, and of `facts` that
    JSON can hold."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            # as bytes: numpy has no bf16
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class EncodedCache:
    """Tensors by content key, in files below `folder` and, the recent ones, in memory.

    A file that is damaged, foreign or cannot be read counts as absent, and is made anew. Raises TrainingError when the
    folder cannot be made.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self._limit = memory_bytes
        self._held = 0
        self._recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cache.dir: {folder} cannot be made: {error.strerror}") from error
        _sweep(folder)

    def check_room(self, wanted: int, what: str) -> None:
        """Raises TrainingError where the disk has less than `wanted` bytes left for `what`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared the cache
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return  # putting something there says what is wrong
        if wanted > free:
            raise TrainingError(
                f"cache.dir: {what} take about {wanted / 2**30:.2f} GiB and {self.folder} has {free / 2**30:.2f} GiB "
                "left: free some space, name another folder (cache.dir), or set cache.enabled: false"
            )

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under `key`, on the CPU; None when there is nothing whole. Not to be changed in place."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        tensors = self._read(key)
        if tensors is not None:
            self._remember(key, tensors)
        return tensors

    def lists(self, key: str) -> bool:
        """Whether there is something under `key`; whether it is whole shows when it is read."""
        return key in self._recent or self._path(key).is_file()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` under `key`. Raises TrainingError when the disk does not take them."""
        self._put(key, _held(tensors))

    def replace(self, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` on the CPU, kept under `key` in place of an entry that is gone: in the middle of training, so what
        the disk does not take is told, and made again when it is next met."""
        kept = _held(tensors)
        with beside_training("writing to cache.dir", "what it lacks is encoded again each time it is met"):
            self._put(key, kept)
        return kept

    def _put(self, key: str, kept: dict[str, Tensor]) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have cleared the cache
            _write_whole(path, b"".join(tensor_file_chunks(kept, {"key": key, "sha256": _digest(kept)})))
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be written: {error.strerror}. The cache takes about {_size(kept) / 2**20:.2f} MiB per "
                "item: free some space, name another folder (cache.dir), or set cache.enabled: false. What was encoded "
                "so far is kept"
            ) from error
        self._remember(key, kept)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        try:  # into memory: a mapped file would change, or fault, under our hands when somebody writes to it
            data = self._path(key).read_bytes()
            tensors = load(data)
            told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except (OSError, SafetensorError, ValueError, RuntimeError, KeyError):
            return None
        return tensors if told.get("key") == key and told.get("sha256") == _digest(tensors) else None

    def _remember(self, key: str, tensors: dict[str, Tensor]) -> None:
        if key in self._recent:
            self._held -= _size(self._recent.pop(key))
        self._recent[key] = tensors
        self._held += _size(tensors)
        while self._held > self._limit and len(self._recent) > 1:
            self._held -= _size(self._recent.popitem(last=False)[1])


def _held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # copied on the CPU too: a row is a view, which would keep its whole batch in memory
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write_whole(path: Path, data: bytes) -> None:
    """The file appears with all of its content; another process that writes the same does no harm."""
    partial = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:  # a stop, too, leaves nothing half written
        partial.unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Removes what killed runs left half written; what is young may be in the hands of a run."""
    for path in folder.glob(f"*/{_PARTIAL}*"):
        with suppress(OSError):  # another process sweeps too
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        # as bytes: numpy has no bf16
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
