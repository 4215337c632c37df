"""The bytes of tensors that are alive, and the arithmetic of a GPU on tensors of the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Inside, `now` are the bytes of the tensor storages that are alive of those that were made or `add`ed, `peak` the
    most since the last `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, once, until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def reset(self) -> None:
        """The peak is what is alive."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.peak = max(self.peak, self.now)
        return result


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Inside, autocast of the CPU computes layer and group norms in fp32, as a GPU's does."""
    before = F.layer_norm, F.group_norm

    def widened(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(*given: Any, **named: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(*given, **named)
            wide = [value.float() if isinstance(value, Tensor) else value for value in given]
            return norm(*wide, **{key: v.float() if isinstance(v, Tensor) else v for key, v in named.items()})

        return computed

    F.layer_norm, F.group_norm = map(widened, before)
    try:
        yield
    finally:
        F.layer_norm, F.group_norm = before
