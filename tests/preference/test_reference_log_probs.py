"""The table of the AR half's reference: which number belongs to which image of which pair."""

from __future__ import annotations

import pytest

from glm_training.engine.errors import TrainingError
from glm_training.preference import reference_log_probs
from glm_training.preference.reference_log_probs import ReferenceLogProbs
from glm_training.utils.distributed import World


def table() -> ReferenceLogProbs:
    found = ReferenceLogProbs(World())
    found.add({"a": (-1.0, -2.0), "b": (-3.0, -4.0)})
    return found


def test_rows_are_the_preferred_images_then_the_rejected_in_the_order_asked():
    assert table().rows(["b", "a"]).tolist() == [-3.0, -1.0, -4.0, -2.0]


def test_what_is_lacking_is_named_once():
    assert table().lacking(["c", "a", "c", "d"]) == ["c", "d"]
    with pytest.raises(TrainingError, match="1 pair without reference"):
        table().rows(["a", "c"])


def test_what_every_process_found_is_added_to_what_was_known(monkeypatch):
    monkeypatch.setattr(reference_log_probs, "gather_objects", lambda world, found: [found, {"d": (-7.0, -8.0)}])
    both = table()
    both.add({"c": (-5.0, -6.0)})
    assert both.rows(["a", "b", "c", "d"]).tolist() == [-1.0, -3.0, -5.0, -7.0, -2.0, -4.0, -6.0, -8.0]


def test_a_checkpoint_gives_the_same_numbers():
    again = ReferenceLogProbs(World())
    again.load(table().state())
    assert again.rows(["a", "b"]).tolist() == [-1.0, -3.0, -2.0, -4.0]
