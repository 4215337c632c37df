"""Which examples come next: an endless shuffled order with one integer of state, independent of the process count."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from glm_training.utils.randomness import make_generator


@dataclass(frozen=True)
class Place:
    """One sample of the sequence: its position there, the dataset's index, and the epoch."""

    position: int
    index: int
    epoch: int


class StatefulSampler:
    """Draws dataset positions; W processes with batch b draw together what one process with batch W*b draws.

    All samples of a run form one endless sequence: the permutation of epoch 0, then that of epoch 1, and so on, each a
    pure function of (seed, epoch). ``position`` counts the samples that *all* processes have drawn, so a run may resume
    on another number of processes or with another batch size. Batches are always full: one may span two epochs, and an
    epoch need not start with a new batch.

    Args:
        num_items: size of the dataset.
        batch_size: samples per process and draw.
        seed: the run seed.
        shuffle: False draws 0, 1, 2, ... in every epoch.
        rank, world_size: this process; rank r takes the r-th run of ``batch_size`` samples of each global batch.

    Raises ``ValueError`` for counts below 1 or a rank outside the world.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, count in (("num_items", num_items), ("batch_size", batch_size), ("world_size", world_size)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size} processes")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._orders: dict[int, Tensor] = {}

    @property
    def global_batch_size(self) -> int:
        """Samples that one draw takes over all processes."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int:
        """The epoch of the next sample of the global sequence, from 0."""
        return self.position // self.num_items

    @property
    def round_length(self) -> int:
        """Samples in a round: each of these begins anew with what there is to draw."""
        return self.num_items

    @property
    def rounds_are_alike(self) -> bool:
        """Whether the same items come in every round, whatever their order."""
        return True

    def rounds_for(self, epochs: int) -> int:
        """Rounds that see every sample at least ``epochs`` times."""
        return epochs

    def items(self, number: int) -> Tensor:
        """The indices of a round's samples in any order: quicker than :meth:`round`."""
        return torch.arange(self.num_items)

    def round(self, number: int) -> tuple[Tensor, Tensor]:
        """The index of each sample of a round, in order, and its epoch."""
        order = torch.arange(self.num_items)
        if self.shuffle:
            order = shuffled(self.num_items, self.seed, "sampler", number)
        return order, torch.full_like(order, number)

    def steps_for(self, epochs: int) -> int:
        """Draws that see every example at least ``epochs`` times, counted from the start; only the last overshoots."""
        return ceil(epochs * self.num_items / self.global_batch_size)

    def next(self) -> list[int]:
        """This process's next ``batch_size`` positions; every process must call it equally often."""
        drawn = self.peek()
        self.position += self.global_batch_size
        self._forget()
        return drawn

    def take(self, count: int) -> list[Place]:
        """The next `count` samples of the global sequence, the same on every process; all must call it alike."""
        places = range(self.position, self.position + count)
        self.position += count
        return [Place(place, *self._at(place)) for place in places]

    def peek(self) -> list[int]:
        """What :meth:`next` will return, without drawing it: for ``ImageDataset.prefetch``."""
        return [self._at(place)[0] for place in self._places()]

    def peek_epochs(self) -> list[int]:
        """The epoch of each position that :meth:`next` will return: for the flips of ``ImageDataset.batch``."""
        return [self._at(place)[1] for place in self._places()]

    def peek_positions(self) -> list[int]:
        """The place of each sample that :meth:`next` will return, in the sequence of all processes' samples."""
        return list(self._places())

    def rows_ahead(self, draws: int) -> int:
        """Samples of the next ``draws`` draws of all processes together."""
        return draws * self.global_batch_size

    def coming(self, draws: int) -> list[int]:
        """The items of this process's next `draws` draws, without drawing them."""
        ahead = copy(self)  # what it keeps besides its place are functions of the seed
        return [index for _ in range(draws) for index in ahead.next()]

    def state_dict(self) -> dict[str, int]:
        """``{"position": samples drawn by all processes}``."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from ``state``; raises ``ValueError`` when it is not a sampler's."""
        if set(state) != {"position"}:
            raise ValueError(f"a sampler's state has the one key 'position', not {sorted(state)}")
        position = state["position"]
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"a sampler's position is an integer of at least 0, not {position!r}")
        self.position = position

    def _places(self) -> range:
        start = self.position + self.rank * self.batch_size
        return range(start, start + self.batch_size)

    def _at(self, place: int) -> tuple[int, int]:
        """The index at a place of the sequence, and its epoch."""
        epoch, row = divmod(place, self.num_items)
        if not self.shuffle:
            return row, epoch
        if epoch not in self._orders:
            self._orders[epoch] = shuffled(self.num_items, self.seed, "sampler", epoch)
        return int(self._orders[epoch][row]), epoch

    def _forget(self) -> None:
        """Lets go of the orders of epochs that are over."""
        kept = {self.epoch, self.epoch + 1}
        self._orders = {epoch: order for epoch, order in self._orders.items() if epoch in kept}


def shuffled(count: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """A permutation of [0, count) as a tensor of 4 bytes each (8 from 2^31 on): one of millions, as a list, would
    take ten times that."""
    order = torch.randperm(count, generator=make_generator(seed, purpose, *counters))
    return order.to(torch.int32) if count < 2**31 else order
