"""Parameters that FSDP2 keeps in shards, gathered for code that calls parts of a model outside its `forward`, or calls
it many times in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Sharing:
    """Processes that share the shards of a half, and where they compute."""

    group: dist.ProcessGroup
    device: torch.device


_whole: WeakSet[nn.Module] = WeakSet()  # modules that a block around this one holds gathered
_sharing: WeakKeyDictionary[nn.Module, Sharing] = WeakKeyDictionary()  # of halves that draw block by block


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


def draw_by_block(root: nn.Module, sharing: Sharing) -> None:
    """From here on `drawing` gathers the blocks of `root` one at a time. Waits for the processes that share them, each
    of which says so here."""
    _sharing[root] = sharing
    for module in sharded_modules(root):  # what blocks are gathered into is made here: in inference mode it would be
        module.unshard()  # of a kind that no backward pass may keep
        module.reshard()


@contextmanager
def drawing(root: nn.Module, blocks: nn.ModuleList) -> Iterator[Turns | None]:
    """`gathered(root)` while `root` draws. After `draw_by_block` its `blocks` stay in shards, and the turns in which
    they are gathered are given."""
    sharing = _sharing.get(root)
    if sharing is None or any(block in _whole for block in blocks):
        with gathered(root):
            yield None
        return
    with gathered(root, without=blocks):
        turns = Turns(blocks, sharing)
        try:
            with turns.of_calls():
                yield turns
        finally:
            turns.end()


class Turns:
    """Blocks that are called in their order, pass after pass, and gathered one at a time by all processes together.

    Processes may make different numbers of passes, and one may give up within a pass: each joins in what the others
    gather until all have come to `end`. Before each pass they count those that make one.
    """

    def __init__(self, blocks: Iterable[nn.Module], sharing: Sharing) -> None:
        self.blocks = [cast(FSDPModule, block) for block in blocks]
        self.sharing = sharing
        self._next = 0  # the block that is due

    @contextmanager
    def block(self, place: int) -> Iterator[None]:
        """Inside, the block at `place` is whole."""
        self._come(place)
        self.blocks[place].unshard()
        try:
            yield
        finally:
            self.blocks[place].reshard()

    @contextmanager
    def of_calls(self) -> Iterator[None]:
        """Inside, a block's `forward`, for which FSDP2 gathers it, is its turn as well."""
        hooks = [
            # what processes tell each other is no part of a block that is compiled
            cast(nn.Module, block).register_forward_pre_hook(
                torch.compiler.disable(partial(self._called, place)), prepend=True
            )
            for place, block in enumerate(self.blocks)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def end(self) -> None:
        """This process makes no more passes; returns when none does."""
        for block in self.blocks:  # one that failed is whole, and would be gathered no more
            block.reshard()
        if self._next:
            self._join(self._next)
        while self._making(False):
            self._join(0)

    def _called(self, place: int, block: nn.Module, inputs: Any) -> None:
        self._come(place)

    def _come(self, place: int) -> None:
        if place != self._next:
            raise RuntimeError(f"block {place} was called where block {self._next} is due, for which others wait")
        if place == 0:
            self._making(True)
        self._next = (place + 1) % len(self.blocks)

    def _join(self, start: int) -> None:
        for block in self.blocks[start:]:
            block.unshard()
            block.reshard()

    def _making(self, makes: bool) -> bool:
        """Whether any process makes another pass. One that does makes it in any case, and does not wait to hear."""
        count = torch.tensor(int(makes), device=self.sharing.device)
        dist.all_reduce(count, group=self.sharing.group)
        return makes or bool(count)
