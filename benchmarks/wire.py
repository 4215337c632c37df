"""What processes of a run tell each other: bytes that left a process, and the collective calls that they belong to."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BYTES_SENT = 200
"""Where `struct tcp_info` of Linux has its `tcpi_bytes_sent`, an unsigned number of 64 bits."""


def bytes_sent() -> int:
    """What this process has sent by the TCP connections that it has now, headers left out. Linux; OSError elsewhere."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
        except OSError:  # the listing's own
            continue
        with socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
            (sent,) = struct.unpack_from("=Q", told, _BYTES_SENT)
            total += sent
    return total


KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}
"""Calls of c10d that move weights and gradients, as the dispatcher names them."""


class Collectives(TorchDispatchMode):
    """Inside, `whole` counts the bytes of the whole tensors that pass through collective calls of this process, by kind
    and size of the group: what each member has after an all-gather, before a reduce-scatter, and on both sides of an
    all-reduce; `calls` counts them. `others`: names of other calls of c10d."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        kind = KINDS.get(name)
        if kind is None:
            self.others[name] += 1
            return
        group = next(dist.ProcessGroup.unbox(arg).size() for arg in args if not isinstance(arg, Tensor | list | tuple))
        tensors = [leaf for leaf in tree_leaves(args[:2]) if isinstance(leaf, Tensor)]
        # of a shard and the whole the larger one; of an all-reduce all there are
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        self.whole[kind, group] += sum(sizes) if kind == "all_reduce" else max(sizes)
        self.calls[kind, group] += 1

    def told(self) -> dict[str, dict[str, int]]:
        """By `kind/group size`: calls, and whole bytes."""
        return {
            f"{kind}/{size}": {"calls": self.calls[kind, size], "bytes": self.whole[kind, size]}
            for kind, size in sorted(self.whole)
        }


RING = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0}
"""Times (n - 1) / n of the whole tensor: what a process of n sends in a ring."""

GLOO = RING | {"reduce_scatter": 2.0}
"""gloo has no reduce-scatter of its own that torch uses: all is reduced, and a shard of it kept."""


def sent_by_one(kind: str, whole: float, group: int, factors: dict[str, float] = RING) -> float:
    """Bytes that one of `group` processes sends in a collective call over so many whole bytes."""
    return factors[kind] * whole * (group - 1) / group
