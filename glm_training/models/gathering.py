"""Parameters that FSDP2 keeps in shards, gathered for code that calls parts of a model outside its `forward`, or calls
it many times in a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn
from torch.distributed.fsdp import FSDPModule

_whole: WeakSet[nn.Module] = WeakSet()  # modules that a block around this one holds gathered


def sharded_modules(root: nn.Module) -> list[FSDPModule]:
    """The modules in `root` that FSDP2 gathers one by one, itself among them; none of an unsharded model."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(root: nn.Module, without: nn.Module | None = None) -> Iterator[None]:
    """Inside, `root` holds whole parameters, except what lies in `without`. Nothing happens to an unsharded model.

    FSDP2 gathers a layer when its `forward` is called and lets it go after; a decode loop that did so for every token
    would move the whole model each time, and one that calls a layer's parts would find shards. Entering waits for all
    processes, leaving does not. Weights must not change inside.
    """
    skipped = set() if without is None else set(without.modules())
    modules = [m for m in sharded_modules(root) if m not in skipped and m not in _whole]  # type: ignore[operator]
    try:
        for module in modules:
            _whole.add(module)  # type: ignore[arg-type]
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for module in modules:
            _whole.discard(module)  # type: ignore[arg-type]
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()
