"""What a computation holds of memory at most, without doing it: its tensors are fake, with sizes and no data.

Fake tensors are of the CPU, as no GPU is needed; where a GPU would do otherwise it is followed: autocast computes layer
and group norms in fp32. Workspaces of kernels are not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Network = TypeVar("Network", bound=nn.Module)


class Alive(TorchDispatchMode):
    """Inside, `now` are the bytes of the tensor storages that are alive of those that were made or `add`ed, `peak` the
    most since the last `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, once, until it is gone; on the meta device it takes nothing."""
        if tensor.device.type == "meta":
            return
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
    before: tuple[Any, Any] = F.layer_norm, F.group_norm

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


@contextmanager
def faking() -> Iterator[None]:
    """Inside, tensors that are made have no data."""
    with FakeTensorMode(allow_non_fake_inputs=True), norms_as_on_a_gpu():
        yield


def with_tensors(network: Network, dtype_of: Callable[[nn.Parameter], torch.dtype]) -> Network:
    """A copy of a network on the meta device with tensors of the CPU, its weights in the dtype that is said of each.
    Inside `faking` they are fake."""
    memo: dict[int, object] = {}
    for param in network.parameters():
        values = torch.zeros(param.shape, dtype=dtype_of(param))
        memo[id(param)] = nn.Parameter(values, requires_grad=param.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(network, memo)


def most_held(compute: Callable[[], Any], *networks: nn.Module) -> int:
    """Bytes that `compute` holds at most besides the weights of the `networks` and their gradients, which are there
    from a pass before. Inside `faking`."""
    for network in networks:
        for param in network.parameters():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
    alive = Alive()
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            alive.add(tensor)
            if tensor.grad is not None:
                alive.add(tensor.grad)
    alive.reset()
    lasting = alive.now
    with alive:
        compute()
    return alive.peak - lasting
