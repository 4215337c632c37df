"""The sampler's order depends on the seed and on the count of samples drawn, on nothing else."""

import pytest
import torch

from glm_training.data import StatefulSampler
from glm_training.data.samplers.sampler import Place, shuffled
from glm_training.utils.randomness import make_generator


def draw(samples: int, world_size: int, batch_size: int, *, num_items: int = 10, start: int = 0) -> list[int]:
    """The global sequence as ``world_size`` processes draw it together, from ``start``."""
    ranks = [
        StatefulSampler(num_items, batch_size, seed=7, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    drawn: list[int] = []
    for sampler in ranks:
        sampler.load_state_dict({"position": start})
    while len(drawn) < samples:
        for sampler in ranks:
            drawn += sampler.next()
    return drawn


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 2), (4, 1), (1, 1), (1, 2), (2, 4), (8, 1)])
def test_topology_does_not_change_the_sequence(world_size: int, batch_size: int) -> None:
    assert draw(48, world_size, batch_size) == draw(48, 1, 4)


def test_the_sequence_is_one_permutation_after_another() -> None:
    sequence = draw(60, 2, 2)
    epochs = [sequence[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_seed_decides_the_order() -> None:
    first, same, other = (StatefulSampler(50, 50, seed=seed).next() for seed in (1, 1, 2))
    assert first == same != other
    assert first != list(range(50))


def test_without_shuffle() -> None:
    sampler = StatefulSampler(3, 2, seed=0, shuffle=False)
    assert [sampler.next() for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_samples_are_taken_once_by_all_processes_alike() -> None:
    for rank in (0, 1):
        sampler = StatefulSampler(3, 2, seed=0, shuffle=False, rank=rank, world_size=2)
        assert sampler.take(2) == [Place(0, 0, 0), Place(1, 1, 0)]
        assert sampler.take(3) == [Place(2, 2, 0), Place(3, 0, 1), Place(4, 1, 1)]
        assert sampler.position == 5


def test_a_batch_larger_than_the_dataset() -> None:
    assert sorted(StatefulSampler(2, 6, seed=0).next()) == [0, 0, 0, 1, 1, 1]


def test_epoch_and_peek() -> None:
    sampler = StatefulSampler(5, 2, seed=0, rank=1, world_size=2)
    seen = []
    for _ in range(3):
        seen.append((sampler.epoch, sampler.peek_epochs()))
        assert sampler.peek() == sampler.peek() == sampler.next()
    assert seen == [(0, [0, 0]), (0, [1, 1]), (1, [2, 2])]
    assert StatefulSampler(5, 8, seed=0).peek_epochs() == [0] * 5 + [1] * 3


def test_steps() -> None:
    sampler = StatefulSampler(10, 2, seed=0, rank=0, world_size=2)
    assert sampler.global_batch_size == 4
    assert [sampler.steps_for(epochs) for epochs in (0, 1, 2, 4)] == [0, 3, 5, 10]


def test_resume_continues_the_sequence() -> None:
    straight = StatefulSampler(10, 4, seed=7)
    expected = [straight.next() for _ in range(9)]
    first = StatefulSampler(10, 4, seed=7)
    drawn = [first.next() for _ in range(4)]
    state = first.state_dict()
    assert state == {"position": 16}
    second = StatefulSampler(10, 4, seed=7)
    second.load_state_dict(state)
    assert drawn + [second.next() for _ in range(5)] == expected


def test_resume_on_another_number_of_processes() -> None:
    assert draw(12, 1, 4) + draw(12, 3, 2, start=12) == draw(24, 1, 4)


def test_no_global_randomness() -> None:
    before = torch.get_rng_state()
    first = StatefulSampler(10, 4, seed=7).next()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert StatefulSampler(10, 4, seed=7).next() == first


def test_old_permutations_are_let_go() -> None:
    sampler = StatefulSampler(3, 2, seed=0)
    for _ in range(30):
        sampler.next()
    assert len(sampler._orders) <= 2


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": 1.0}, {"position": True}, {"place": 1}])
def test_a_state_that_is_no_state(state: dict) -> None:
    with pytest.raises(ValueError, match="position"):
        StatefulSampler(3, 2, seed=0).load_state_dict(state)


@pytest.mark.parametrize(
    "arguments", [{"num_items": 0}, {"batch_size": 0}, {"world_size": 0}, {"rank": 1}, {"rank": -1}]
)
def test_counts_out_of_range(arguments: dict) -> None:
    with pytest.raises(ValueError):
        StatefulSampler(**({"num_items": 3, "batch_size": 1, "seed": 0} | arguments))


def test_an_order_is_small_and_that_of_its_generator() -> None:
    order = shuffled(50, 7, "sampler", 1)
    assert (
        order.dtype == torch.int32
        and order.tolist() == torch.randperm(50, generator=make_generator(7, "sampler", 1)).tolist()
    )
    places = StatefulSampler(50, 1, seed=7).take(100)[50:]
    assert [place.index for place in places] == order.tolist() and type(places[0].index) is int
