"""Batches of one size each: an endless sequence of them, with one integer of state, shared out over the processes.

What is drawn comes in rounds of equal length: an epoch, or with set weights a block of 1,024 draws. The items of a
round are put together by size in the order in which they were drawn, cut into batches of at most `batch_size` rows, and
the batches are shuffled as wholes. Every item of a round comes once; the last batch of each size may be short.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.data.samplers.sampler import Place, StatefulSampler, shuffled

_KEPT_ROUNDS = 2
"""Draws near the end of a round need the next one."""


@dataclass(frozen=True)
class _Round:
    """indices, epochs: of all rows of a round, batch after batch. ends: row at which each batch is over."""

    indices: Tensor
    epochs: Tensor
    ends: list[int]


class BucketSampler(StatefulSampler):
    """What `draws` draws, in batches of one size; process r of W takes every W-th batch, beginning with the r-th.

    So one process with two batches per step sees what two processes with one see. ``position`` counts the rows of the
    batches that all processes have drawn: a run may resume on another number of processes and draw each batch that was
    left. With another batch size it goes on with a round that is cut otherwise: of that one round some items may come
    twice or not at all.

    Args:
        draws: says which items come in which round.
        sizes: of every item, anything that can be compared; items of one batch have equal ones.
    """

    def __init__(self, draws: StatefulSampler, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__(
            draws.num_items,
            draws.batch_size,
            seed=draws.seed,
            shuffle=draws.shuffle,
            rank=draws.rank,
            world_size=draws.world_size,
        )
        if len(sizes) != draws.num_items:
            raise ValueError(f"{len(sizes)} sizes were given for {draws.num_items} items")
        self._draws = draws
        numbers = {size: number for number, size in enumerate(sorted(set(sizes)))}
        self._buckets = torch.tensor([numbers[size] for size in sizes], dtype=torch.int32)
        self._rounds: OrderedDict[int, _Round] = OrderedDict()

    @property
    def epoch(self) -> int:
        """The epoch of the next sample of the global sequence, from 0."""
        self._draws.position = self.position
        return self._draws.epoch

    def steps_for(self, epochs: int) -> int:
        """Draws that see every item at least ``epochs`` times, counted from the start; only the last overshoots."""
        rounds = self._draws.rounds_for(epochs)
        if self._draws.rounds_are_alike:
            batches = rounds * self._batches_in(0)
        else:
            batches = sum(map(self._batches_in, range(rounds)))
        return -(-batches // self.world_size)

    def next(self) -> list[int]:
        """The items of this process's next batch; every process must call it equally often."""
        drawn = self.peek()
        *_, last = self._batches(self.world_size)
        self.position = last.stop
        return drawn

    def take(self, count: int) -> list[Place]:
        """Raises NotImplementedError: single items would take their batches apart."""
        raise NotImplementedError("batches of one size are drawn as wholes")

    def peek(self) -> list[int]:
        """What :meth:`next` will return, without drawing it."""
        return [self._at(place)[0] for place in self.peek_positions()]

    def peek_epochs(self) -> list[int]:
        """The epoch of each item that :meth:`next` will return."""
        return [self._at(place)[1] for place in self.peek_positions()]

    def peek_positions(self) -> list[int]:
        """The place of each item that :meth:`next` will return, in the sequence of all rows."""
        return list(list(self._batches(self.world_size))[self.rank])

    def rows_ahead(self, draws: int) -> int:
        """Rows of the next ``draws`` draws of all processes together."""
        return sum(len(batch) for batch in self._batches(draws * self.world_size))

    def _batches(self, count: int) -> Iterator[range]:
        """The rows of each of the next `count` batches, as places of the sequence."""
        place = self.position
        length = self._draws.round_length
        for _ in range(count):
            number, row = divmod(place, length)
            ends = self._round(number).ends
            batch = bisect_right(ends, row)
            start = ends[batch - 1] if batch else 0  # before `row` where another batch size was drawn up to here
            yield range(number * length + start, number * length + ends[batch])
            place = number * length + ends[batch]

    def _batches_in(self, number: int) -> int:
        """Batches of a round."""
        counts = torch.bincount(self._buckets[self._draws.items(number)])
        return int(((counts + self.batch_size - 1) // self.batch_size).sum())

    def _at(self, place: int) -> tuple[int, int]:
        number, row = divmod(place, self._draws.round_length)
        found = self._round(number)
        return int(found.indices[row]), int(found.epochs[row])

    def _round(self, number: int) -> _Round:
        if number not in self._rounds:
            self._rounds[number] = self._made(number)
            while len(self._rounds) > _KEPT_ROUNDS:
                self._rounds.popitem(last=False)
        self._rounds.move_to_end(number)
        return self._rounds[number]

    def _made(self, number: int) -> _Round:
        indices, epochs = self._draws.round(number)
        by_size = torch.argsort(self._buckets[indices], stable=True)
        counts = torch.bincount(self._buckets[indices]).tolist()
        starts: list[int] = []
        stops: list[int] = []
        first = 0
        for count in counts:
            own = range(first, first + count, self.batch_size)
            starts += own
            stops += [min(start + self.batch_size, first + count) for start in own]
            first += count
        if self.shuffle:
            order = shuffled(len(starts), self.seed, "bucket batches", number).tolist()
        else:  # as their first items stand in the data
            order = torch.argsort(by_size[torch.tensor(starts)]).tolist()
        rows = torch.cat([by_size[starts[batch] : stops[batch]] for batch in order])
        ends = torch.tensor([stops[batch] - starts[batch] for batch in order]).cumsum(0).tolist()
        return _Round(indices[rows], epochs[rows], ends)
