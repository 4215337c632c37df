"""Batches of one size: every item once per round, one place for all processes, and what a short batch weighs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from glm_training.data.samplers.bucket_sampler import BucketSampler
from glm_training.data.samplers.mixed_sampler import BLOCK, MixedSampler
from glm_training.data.samplers.sampler import StatefulSampler

WIDE, TALL, SQUARE = (64, 128), (128, 64), (64, 64)
SIZES = [WIDE] * 5 + [TALL] * 7 + [SQUARE] * 1 + [WIDE] * 4
"""17 items; in batches of 3: 3 wide, 3 tall (the last of one row), 1 square: 7 of them."""


def sampler(rank: int = 0, world_size: int = 1, *, batch_size: int = 3, seed: int = 5, **options) -> BucketSampler:
    draws = StatefulSampler(len(SIZES), batch_size, seed=seed, rank=rank, world_size=world_size, **options)
    return BucketSampler(draws, SIZES)


def together(world_size: int, draws: int, *, start: int = 0, batch_size: int = 3) -> list[list[int]]:
    """The batches of all processes, in the order of the sequence."""
    ranks = [sampler(rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    for one in ranks:
        one.load_state_dict({"position": start})
    return [one.next() for _ in range(draws) for one in ranks]


def epochs_of(batches: Iterator[list[int]], count: int) -> list[list[list[int]]]:
    found: list[list[list[int]]] = []
    for _ in range(count):
        found.append([])
        while sum(map(len, found[-1])) < len(SIZES):
            found[-1].append(next(batches))
    return found


def test_every_item_once_per_epoch_in_batches_of_one_size() -> None:
    one = sampler()
    epochs = epochs_of(iter(lambda: one.next(), None), 20)
    for epoch in epochs:
        assert sorted(item for batch in epoch for item in batch) == list(range(17))
        assert all(len({SIZES[item] for item in batch}) == 1 for batch in epoch)
        assert sorted(map(len, epoch)) == [1, 1, 3, 3, 3, 3, 3]
    assert one.position == 20 * 17
    # the place of the single square item among 7 batches: another one from epoch to epoch
    assert len({epoch.index([12]) for epoch in epochs}) > 3
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 20


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_sequence_of_batches_is_dealt_out(world_size: int) -> None:
    assert together(world_size, 8) == together(1, 8 * world_size)


def test_all_know_the_rows_of_a_step() -> None:
    """Two draws of three processes: six batches, some of one row, and the same number at each process."""
    ranks = [sampler(rank, 3) for rank in range(3)]
    for _ in range(10):
        ahead = [one.rows_ahead(2) for one in ranks]
        drawn = sum(len(one.next()) for _ in range(2) for one in ranks)
        assert ahead == [drawn] * 3
    assert len({one.position for one in ranks}) == 1
    plain = StatefulSampler(17, 3, seed=0, rank=1, world_size=2)
    assert plain.rows_ahead(2) == 12


def test_places_name_every_row_once() -> None:
    ranks = [sampler(rank, 2) for rank in range(2)]
    places, items = [], []
    for _ in range(21):
        for one in ranks:
            places += one.peek_positions()
            assert [epoch for epoch in one.peek_epochs()] == [place // 17 for place in one.peek_positions()]
            assert one.peek() == one.peek()
            items += one.next()
    assert places == list(range(len(places))) and len(items) == len(places)
    assert StatefulSampler(17, 3, seed=0, rank=1, world_size=2).peek_positions() == [3, 4, 5]


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_run_resumes_within_an_epoch_on_another_number_of_processes(after: int) -> None:
    whole = together(1, 30)
    first = sampler()
    drawn = [first.next() for _ in range(after)]
    state = first.state_dict()
    assert state == {"position": sum(map(len, drawn))}
    assert drawn + together(1, 12, start=state["position"]) == whole[: after + 12]
    assert drawn + together(2, 6, start=state["position"]) == whole[: after + 12]


def test_another_batch_size_goes_on_within_the_round() -> None:
    """From row 7 of 17: what is left of this epoch in other batches, then whole epochs again."""
    one = sampler(batch_size=4)
    one.load_state_dict({"position": 7})
    while one.position < 17:
        batch = one.next()
        assert len({SIZES[item] for item in batch}) == 1
    assert one.position == 17
    (epoch,) = epochs_of(iter(lambda: one.next(), None), 1)
    assert sorted(item for batch in epoch for item in batch) == list(range(17))


def test_steps_are_those_of_the_batches() -> None:
    """7 batches per epoch: on two processes 4 draws for one, 11 for three."""
    assert [sampler(0, 2).steps_for(epochs) for epochs in (0, 1, 2, 3)] == [0, 4, 7, 11]
    assert sampler().steps_for(3) == 21


def test_without_shuffling_batches_stand_as_their_first_items_do() -> None:
    one = sampler(shuffle=False)
    first = [[0, 1, 2], [3, 4, 13], [5, 6, 7], [8, 9, 10], [11], [12], [14, 15, 16]]
    assert [one.next() for _ in range(14)] == first * 2


def test_the_epoch_is_that_of_the_next_row() -> None:
    one, seen = sampler(), []
    for _ in range(21):
        seen.append(one.epoch)
        one.next()
    assert seen == [0] * 7 + [1] * 7 + [2] * 7


def test_of_weighted_sets_a_block_takes_the_epochs_part() -> None:
    """Shares of 1 and 3 of two sets, 5 and 12 items: a block of 1,024 draws has 256 of the first, each item 51 or 52
    times, and its batches hold what the mixed sampler draws there."""
    sizes = [WIDE] * 3 + [TALL] * 2 + [WIDE] * 7 + [SQUARE] * 5
    plain = MixedSampler([5, 12], [1.0, 3.0], 4, seed=9)
    one = BucketSampler(MixedSampler([5, 12], [1.0, 3.0], 4, seed=9), sizes)
    for _ in range(2):
        expected = Counter(item for _ in range(BLOCK // 4) for item in plain.next())
        found: Counter[int] = Counter()
        batches = 0
        while one.position % BLOCK or not found:
            batch = one.next()
            assert len({sizes[item] for item in batch}) == 1
            found.update(batch)
            batches += 1
        assert found == expected and sum(found[item] for item in range(5)) == 256
        assert batches <= BLOCK // 4 + 2  # at most one short batch more for each further size
    block = [sizes[item] for item in MixedSampler([5, 12], [1.0, 3.0], BLOCK, seed=9).next()]  # sees every item
    assert one.steps_for(1) == sum(-(-count // 4) for count in Counter(block).values())


def test_one_size_in_full_batches_is_as_many_draws_as_without_buckets() -> None:
    one = BucketSampler(StatefulSampler(12, 3, seed=1), [SQUARE] * 12)
    assert one.steps_for(5) == StatefulSampler(12, 3, seed=1).steps_for(5) == 20
    assert [one.rows_ahead(draws) for draws in (1, 4)] == [3, 12]


def test_no_global_randomness_and_few_rounds_in_memory() -> None:
    before = torch.get_rng_state()
    one = sampler()
    for _ in range(70):
        one.next()
    assert torch.equal(torch.get_rng_state(), before)
    assert len(one._rounds) <= 2


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="2 sizes were given for 3 items"):
        BucketSampler(StatefulSampler(3, 1, seed=0), [WIDE, TALL])
    with pytest.raises(NotImplementedError, match="as wholes"):
        sampler().take(1)
