"""Shares in closed form, every sample once per epoch of its set, whatever the processes."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import floor

import pytest

from glm_training.data.samplers.mixed_sampler import BLOCK, MixedSampler
from glm_training.data.samplers.sampler import Place

LENGTHS, WEIGHTS = (7, 40, 300), (1.0, 2.0, 5.0)


def sampler(
    batch_size: int = 1, *, rank: int = 0, world_size: int = 1, seed: int = 3, **options: object
) -> MixedSampler:
    return MixedSampler(LENGTHS, WEIGHTS, batch_size, seed=seed, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]


def set_of(index: int) -> int:
    return 0 if index < 7 else 1 if index < 47 else 2


def test_shares_are_exact_at_the_end_of_each_block() -> None:
    counts = Counter(set_of(place.index) for place in sampler().take(3 * BLOCK))
    assert counts == {0: 3 * BLOCK // 8, 1: 3 * BLOCK // 4, 2: 3 * BLOCK * 5 // 8}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1e-4, 1.0), (1 / 3, 1 / 3, 1 / 3), (0.123, 4.5, 0.0061, 2.0)])
def test_shares_in_closed_form(weights: tuple[float, ...]) -> None:
    mixed = MixedSampler([5] * len(weights), weights, 1, seed=0)
    total = sum(map(Fraction, weights))
    assert sum(mixed.shares) == 1
    for places in (0, 1, 17, BLOCK, 10**6 + 3, 10**12):
        drawn = mixed.drawn(places)
        assert sum(drawn) == places and drawn[0] == floor(places * Fraction(weights[0]) / total)
        assert all(
            abs(count - places * Fraction(weight) / total) < len(weights)
            for count, weight in zip(drawn, weights, strict=True)
        )
    counts = Counter(place.index // 5 for place in mixed.take(4 * BLOCK))
    assert [counts[number] for number in range(len(weights))] == mixed.drawn(4 * BLOCK)


def test_every_sample_comes_once_in_each_epoch_of_its_set() -> None:
    seen = Counter((place.index, place.epoch) for place in sampler().take(2 * BLOCK))
    assert set(seen.values()) == {1}
    drawn = sampler().drawn(2 * BLOCK)
    starts = (0, 7, 47)
    for start, length, count in zip(starts, LENGTHS, drawn, strict=True):
        for epoch in range(count // length):
            assert all((start + row, epoch) in seen for row in range(length)), (start, epoch)


def test_epochs_of_a_set_have_orders_of_their_own() -> None:
    places = [place for place in sampler().take(8 * BLOCK) if set_of(place.index) == 2]
    first, second = ([place.index for place in places if place.epoch == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(47, 347))
    assert first != second and first != sorted(first)


def test_every_epoch_and_every_block_is_shuffled_anew() -> None:
    """One set of two blocks: its first block has other samples in each epoch. Two sets dealt in turn: which of them
    comes is another pattern in each block."""
    alone = MixedSampler((2 * BLOCK,), (1.0,), 1, seed=0).take(4 * BLOCK)
    halves = [{place.index for place in alone[start * BLOCK : (start + 1) * BLOCK]} for start in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(2 * BLOCK))
    assert halves[0] != halves[2]
    pair = MixedSampler((10**5, 10**5), (1.0, 1.0), 1, seed=0).take(2 * BLOCK)
    pattern = [place.index < 10**5 for place in pair]
    assert pattern[:BLOCK] != pattern[BLOCK:]


def test_sets_alternate_without_a_pattern() -> None:
    """Two halves on two processes: dealt in turn, each process would see one set alone."""
    mixed = [MixedSampler((50, 50), (1.0, 1.0), 1, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    counts = [Counter(index // 50 for _ in range(500) for index in one.next()) for one in mixed]
    # of 500 draws out of a block's 1024 a set has 250, standard deviation sqrt(500 / 4 * 524 / 1023) = 8
    assert all(200 < count[0] < 300 for count in counts)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 2), (4, 1), (1, 1), (3, 4)])
def test_topology_does_not_change_the_sequence(world_size: int, batch_size: int) -> None:
    ranks = [sampler(batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    drawn: list[tuple[int, int]] = []
    while len(drawn) < 1200:
        for one in ranks:
            peeked = one.peek(), one.peek_epochs()
            drawn += zip(one.next(), peeked[1], strict=True)
            assert [index for index, _ in drawn[-batch_size:]] == peeked[0]
    assert drawn[:1200] == [(place.index, place.epoch) for place in sampler().take(1200)]


def test_resume_on_another_number_of_processes() -> None:
    straight = [place.index for place in sampler().take(1500)]
    two = [sampler(3, rank=rank, world_size=2) for rank in (0, 1)]
    before = [index for _ in range(150) for one in two for index in one.next()]
    alone = sampler(5)
    alone.load_state_dict(two[0].state_dict())
    assert two[0].state_dict() == {"position": 900}
    assert before + [index for _ in range(120) for index in alone.next()] == straight


def test_without_shuffle_sets_are_dealt_in_their_order() -> None:
    mixed = MixedSampler((2, 3), (1.0, 2.0), 6, seed=0, shuffle=False)
    # of 1, 2, 3 ... places the first set has 0, 0, 1, 1, 1, 2
    assert mixed.take(7) == [
        Place(0, 2, 0), Place(1, 3, 0), Place(2, 0, 0), Place(3, 4, 0), Place(4, 2, 1), Place(5, 1, 0), Place(6, 3, 1)
    ]  # fmt: skip


def test_steps_see_every_sample() -> None:
    mixed = sampler(8, world_size=2)
    # the last set: 300 samples at 5/8 need 480 places, the second 40 at 1/4 need 160, the first 7 at 1/8 need 56
    assert [mixed.steps_for(epochs) for epochs in (0, 1, 2, 3)] == [0, 64, 64, 128]
    everything = {place.index for place in sampler().take(64 * 16)}
    assert everything == set(range(347))
    assert [mixed.epoch, setattr(mixed, "position", 1024), mixed.epoch] == [0, None, 2]


def test_seeds_and_bad_arguments() -> None:
    assert sampler(seed=1).take(50) != sampler(seed=2).take(50) and sampler().take(50) == sampler().take(50)
    for lengths, weights in (((3, 0), (1.0, 1.0)), ((3, 3), (1.0,)), ((3, 3), (1.0, 0.0))):
        with pytest.raises(ValueError, match="length and a weight above 0"):
            MixedSampler(lengths, weights, 1, seed=0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_items_of_a_block_are_those_that_are_drawn_in_it(shuffle: bool) -> None:
    """Sets of 300, 5 and 41 items at odd shares: epochs of theirs end within blocks."""
    one = MixedSampler([300, 5, 41], [0.3, 1.7, 2.0], 4, seed=3, shuffle=shuffle)
    for block in range(4):
        indices, epochs = one.round(block)
        assert sorted(one.items(block).tolist()) == sorted(indices.tolist())
        drawn = [one._at(block * BLOCK + offset) for offset in range(BLOCK)]
        assert list(zip(indices.tolist(), epochs.tolist(), strict=True)) == drawn
