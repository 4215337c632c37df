"""Which rows go through a network together, and what becomes of their figures."""

from __future__ import annotations

import pytest
import torch

from glm_training.engine import validation
from glm_training.engine.validation import RowFigures, Subject, by_size, passes
from glm_training.utils.distributed import World


def test_rows_are_grouped_alike_on_any_number_of_processes():
    alone = [rows for rows, _ in passes(7, 2, World())]
    assert alone == [[0, 1], [2, 3], [4, 5], [6]]
    shares = [passes(7, 2, World(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(rows for share in shares for rows, counts in share if counts) == alone
    assert [counts for share in shares for _, counts in share] == [True, True, True, False, True, False]


def test_only_groups_with_a_wanted_row_are_passed_and_they_are_whole():
    assert passes(7, 2, World(), [5, 6]) == [([4, 5], True), ([6], True)]
    assert [passes(7, 2, World(rank, 2), [3]) for rank in (0, 1)] == [[([2, 3], True)], [([2, 3], False)]]


def test_a_row_is_the_mean_of_what_it_was_given():
    found = RowFigures(3)
    found.add([0, 2], {"dit/loss": torch.tensor([1.0, 5.0])})
    found.add([0, 2], {"dit/loss": torch.tensor([2.0, 7.0])})
    found.add([1], {"dit/loss": torch.tensor([4.0]), "ar/loss": torch.tensor([9.0])})
    found.add([0], {"dit/loss": torch.tensor([100.0])}, counts=False)
    gathered = found.gathered(World())
    assert gathered["dit/loss"].tolist() == [1.5, 4.0, 6.0]
    assert gathered["ar/loss"].isnan().tolist() == [True, False, True] and gathered["ar/loss"][1] == 9


def test_processes_bring_their_rows_together(monkeypatch):
    shares = [RowFigures(3), RowFigures(3)]
    shares[0].add([0, 1], {"loss": torch.tensor([1.0, 2.0])})
    shares[0].add([2], {"accuracy": torch.tensor([0.5])}, counts=False)  # its names are known everywhere
    shares[1].add([2], {"loss": torch.tensor([3.0]), "accuracy": torch.tensor([1.0])})
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(validation, "gather_tensor", lambda world, rows: sent.append(rows) or rows)
    for share in shares:
        share.gathered(World())
    monkeypatch.setattr(validation, "gather_tensor", lambda world, rows: torch.cat(sent))
    found = shares[0].gathered(World())
    assert found["loss"].tolist() == [1.0, 2.0, 3.0]
    assert found["accuracy"].isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(("count", "text"), [(1, "1 held-out pair"), (4, "4 held-out pairs")])
def test_a_subject_says_how_many_of_what(count, text):
    assert str(Subject("held-out pair", ("a cat",) * count, "")) == text


def test_rows_of_a_pass_have_pictures_of_one_size():
    """Five rows of three sizes, two at once, on one process and on two."""
    sizes = [(64, 64), (32, 96), (64, 64), (64, 64), (96, 32)]
    assert by_size(sizes) == [[0, 2, 3], [1], [4]]
    alone = [rows for rows, _ in passes(5, 2, World(), pixels=sizes)]
    assert alone == [[0, 2], [3], [1], [4]]
    shares = [passes(5, 2, World(rank, 3), pixels=sizes) for rank in range(3)]
    assert sorted(rows for share in shares for rows, counts in share if counts) == sorted(alone)
    assert passes(5, 2, World(), [2], pixels=sizes) == [([0, 2], True)]
    assert [rows for rows, _ in passes(5, 2, World(), pixels=[(64, 64)] * 5)] == [
        rows for rows, _ in passes(5, 2, World())
    ]
