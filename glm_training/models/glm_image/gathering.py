"""Parameters that FSDP2 keeps in shards, gathered for code that calls parts of a model outside its `forward`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered(root: nn.Module, without: nn.Module | None = None) -> Iterator[None]:
    """Inside, `root` holds whole parameters, except what lies in `without`. Nothing happens to an unsharded model.

    FSDP2 gathers a layer when its `forward` is called; a decode loop that gathered for every token would move the whole
    model each time, and one that calls a layer's parts would find shards.
    """
    skipped = set() if without is None else set(without.modules())
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule) and module not in skipped]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
