"""Parameters that FSDP2 keeps in shards, gathered for code that calls parts of a model outside its `forward`, or calls
it many times in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


class OtherFailed(Exception):
    """Another of the processes that share the shards of a half has failed while they draw."""


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
            module.set_reshard_after_forward(True, recurse=False)  # one that failed in its `forward` would stay whole
            module.reshard()
            module.set_reshard_after_forward(module is not root, recurse=False)


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
        except BaseException:
            turns.break_off()
            raise
        turns.end()


class Word(IntEnum):
    """What a process tells those that it shares shards with; of several the highest counts."""

    DONE = 0
    CHECKS = 1
    PASSES = 2
    FAILED = 3


class Turns:
    """Blocks that are called in their order, pass after pass, and gathered one at a time by all processes together.

    Before each pass they tell each other who makes one. They may make different numbers of passes: who makes none joins
    in what the others gather, until all have come to `end`. Of one that fails the others hear before their next pass or
    check, and draw no further: each could otherwise wait for the other in another place.
    """

    def __init__(self, blocks: Iterable[nn.Module], sharing: Sharing) -> None:
        self.blocks = [cast(FSDPModule, block) for block in blocks]
        self.sharing = sharing
        self._next = 0  # the block that is due
        self._failed = False  # one of the processes has

    def asking(self, on_step: Callable[[int], None] | None) -> Callable[[int], None] | None:
        """`on_step` when no process makes a pass and none has failed: in it all of a run may wait for each other."""
        if on_step is None:
            return None

        def asked(step: int) -> None:
            while self._go_on(Word.CHECKS) is Word.PASSES:
                self._join(0)
            on_step(step)

        return asked

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
        """This process makes no more passes; returns when none does, or one has failed."""
        while (word := self._tell(Word.DONE)) in (Word.PASSES, Word.CHECKS):
            if word is Word.PASSES:
                self._join(0)

    def break_off(self) -> None:
        """This process has failed; gathers what the others still do in their pass, and tells them."""
        for block in self.blocks:  # one that failed is whole, and would be gathered no more
            block.reshard()
        if self._failed:
            return
        if self._next:
            self._join(self._next)
        self._tell(Word.FAILED)

    def _called(self, place: int, block: nn.Module, inputs: Any) -> None:
        self._come(place)

    def _come(self, place: int) -> None:
        if place != self._next:
            raise RuntimeError(f"block {place} was called where block {self._next} is due, for which others wait")
        if place == 0:
            self._go_on(Word.PASSES)
        self._next = (place + 1) % len(self.blocks)

    def _join(self, start: int) -> None:
        for block in self.blocks[start:]:
            block.unshard()
            block.reshard()

    def _go_on(self, word: Word) -> Word:
        """Tells the others so, and gives what counts; OtherFailed where one of them has failed."""
        counts = self._tell(word)
        if counts is Word.FAILED:
            self._failed = True
            raise OtherFailed
        return counts

    def _tell(self, word: Word) -> Word:
        """What counts of the words of all."""
        told = torch.tensor(int(word), device=self.sharing.device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.sharing.group)
        return Word(int(told))
