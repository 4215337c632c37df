"""Several sets drawn from at given shares: one endless order with one integer of state.

Legend: p, a place in the sequence; S sets with lengths n_s and shares w_s, which sum to 1.

The places 0, 1, 2, ... are dealt to the sets by rounding down: of the first p places the first set has floor(p w_0),
the second floor of its share of what is left, and so on, in exact arithmetic. So the number of samples that a set has
given by any place is a closed form, at most S - 1 from p w_s, and the m-th of them is the m-th of the set's own
permutations, one after the other. Places are then shuffled within blocks of 1024, so that the sets alternate without a
pattern that could fall in with the processes; at the end of each block the shares are exact again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from glm_training.data.samplers.sampler import StatefulSampler, shuffled

BLOCK = 1024
_KEPT_BLOCKS = 2
_KEPT_EPOCHS = 2
"""Of each set: draws near the end of an epoch need its order and the next one's."""


class MixedSampler(StatefulSampler):
    """Draws from sets put one after the other, at the shares of their weights; else as :class:`StatefulSampler`.

    Every sample of a set comes once in each epoch of that set; sets have epochs of their own.

    Args:
        lengths: of the sets; index i of set s is drawn as ``sum(lengths[:s]) + i``.
        weights: of the sets, above 0, in any unit.
        batch_size, seed, rank, world_size: as of :class:`StatefulSampler`.
        shuffle: False draws each set in its own order, and deals the sets without shuffling.

    Raises ``ValueError`` for lengths, weights or counts that are not positive.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(sum(lengths), batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        if len(weights) != len(lengths) or min(lengths) < 1 or min(weights) <= 0:
            raise ValueError(f"each set has a length and a weight above 0, not {list(lengths)} and {list(weights)}")
        self.lengths = tuple(lengths)
        exact = [Fraction(weight) for weight in weights]
        self.shares = tuple(weight / sum(exact) for weight in exact)
        self._starts = [0, *accumulate(self.lengths)]
        # of what the sets before it leave, the part that a set takes
        self._parts = [weight / sum(exact[number:]) for number, weight in enumerate(exact)]
        self._blocks: OrderedDict[int, Tensor] = OrderedDict()
        self._own: list[OrderedDict[int, Tensor]] = [OrderedDict() for _ in self.lengths]

    @property
    def epoch(self) -> int:
        """Whole passes over every set that were dealt by now; exact at the end of a block."""
        return min(count // length for count, length in zip(self.drawn(self.position), self.lengths, strict=True))

    def drawn(self, places: int) -> list[int]:
        """How many of the first `places` places each set has, before they are shuffled within blocks: so exactly at
        the end of a block."""
        counts = []
        for part in self._parts:
            counts.append(places * part.numerator // part.denominator)
            places -= counts[-1]
        return counts

    @property
    def round_length(self) -> int:
        """Samples in a block."""
        return BLOCK

    @property
    def rounds_are_alike(self) -> bool:
        """Each block has other items."""
        return False

    def items(self, number: int) -> Tensor:
        """The indices of a block's samples in any order: quicker than :meth:`round`."""
        found = []
        before, after = (self.drawn(block * BLOCK) for block in (number, number + 1))
        for part, (first, last, length) in enumerate(zip(before, after, self.lengths, strict=True)):
            for epoch in range(first // length, -(-last // length)):
                rows = self._order(part, epoch)[max(first - epoch * length, 0) : last - epoch * length]
                found.append(self._starts[part] + rows)
        return torch.cat(found)

    def round(self, number: int) -> tuple[Tensor, Tensor]:
        """The index of each sample of a block, in order, and its epoch."""
        drawn = torch.tensor([self._at(number * BLOCK + offset) for offset in range(BLOCK)])
        return drawn[:, 0], drawn[:, 1]

    def steps_for(self, epochs: int) -> int:
        """Draws in whole blocks that see every sample of every set at least `epochs` times, counted from the start."""
        return -(-self.rounds_for(epochs) * BLOCK // self.global_batch_size)

    def rounds_for(self, epochs: int) -> int:
        """Blocks that see every sample of every set at least `epochs` times."""
        wanted = [epochs * length for length in self.lengths]
        low, high = 0, 1

        def enough(blocks: int) -> bool:
            return all(have >= want for have, want in zip(self.drawn(blocks * BLOCK), wanted, strict=True))

        while not enough(high):
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle + 1, high)
        return low

    def _at(self, place: int) -> tuple[int, int]:
        block, offset = divmod(place, BLOCK)
        if self.shuffle:
            offset = int(_kept(self._blocks, block, _KEPT_BLOCKS, BLOCK, self.seed, "mixture", block)[offset])
        number, count = self._dealt(block * BLOCK + offset)
        length = self.lengths[number]
        epoch, row = divmod(count, length)
        return self._starts[number] + int(self._order(number, epoch)[row]), epoch

    def _order(self, number: int, epoch: int) -> Tensor:
        """The rows of a set in the order of one of its epochs."""
        length = self.lengths[number]
        if not self.shuffle:
            return torch.arange(length)
        return _kept(self._own[number], epoch, _KEPT_EPOCHS, length, self.seed, "mixture set", number, epoch)

    def _dealt(self, place: int) -> tuple[int, int]:
        """The set that a place is dealt to, and how many the set had before."""
        for number, part in enumerate(self._parts):
            count = place * part.numerator // part.denominator
            if (place + 1) * part.numerator // part.denominator > count:
                return number, count
            place -= count
        raise AssertionError("the last set takes all that is left")

    def _forget(self) -> None:
        """Orders are let go of as others are needed."""


def _kept(
    orders: OrderedDict[int, Tensor], key: int, limit: int, count: int, seed: int, purpose: str, *counters: int
) -> Tensor:
    """The permutation with that name, from `orders` where it is one of the `limit` newest there."""
    if key not in orders:
        orders[key] = shuffled(count, seed, purpose, *counters)
        while len(orders) > limit:
            orders.popitem(last=False)
    orders.move_to_end(key)
    return orders[key]
