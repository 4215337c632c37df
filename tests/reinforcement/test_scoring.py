"""Scorings beside drawing come back in their order, and their errors too."""

from __future__ import annotations

import threading

import pytest

from glm_training.reinforcement import scoring
from glm_training.reinforcement.scoring import ScoringQueue
from glm_training.rewards import RewardError, ScoringStopped
from glm_training.utils.distributed import World


@pytest.mark.parametrize("overlap", [True, False])
def test_results_come_in_the_order_they_were_put(overlap):
    with ScoringQueue(World(), lambda: False, overlap=overlap) as queue:
        for number in range(4):
            queue.put(lambda number=number: number)
        assert queue.results() == [0, 1, 2, 3]


def test_with_overlap_a_scoring_runs_beside_the_caller():
    began, go_on = threading.Event(), threading.Event()

    def score():
        began.set()
        assert go_on.wait(10)
        return 1

    with ScoringQueue(World(), lambda: False, overlap=True) as queue:
        queue.put(score)
        assert began.wait(10)
        go_on.set()
        assert queue.results() == [1]


@pytest.mark.parametrize("overlap", [True, False])
def test_an_error_is_raised_where_the_results_are_asked_for(overlap):
    def fail():
        raise RewardError("no score")

    with pytest.raises(RewardError, match="no score"), ScoringQueue(World(), lambda: False, overlap=overlap) as queue:
        queue.put(fail)
        queue.results()


def test_a_stop_ends_the_wait_for_a_scoring_that_hangs():
    release = threading.Event()
    with pytest.raises(ScoringStopped), ScoringQueue(World(), lambda: True, overlap=True) as queue:
        queue.put(lambda: release.wait(30))
        queue.results()
    release.set()


def test_leaving_by_an_error_drops_what_has_not_begun(monkeypatch):
    monkeypatch.setattr(scoring, "FAREWELL_SECONDS", 0.0)
    began, go_on = threading.Event(), threading.Event()
    with pytest.raises(KeyError), ScoringQueue(World(), lambda: False, overlap=True) as queue:
        queue.put(lambda: began.set() or go_on.wait(10))
        queue.put(lambda: 2)
        assert began.wait(10)
        raise KeyError
    assert [future.cancelled() for future in queue._waiting] == [False, True]
    go_on.set()


def test_leaving_in_peace_waits_for_all_that_was_put():
    go_on, ran = threading.Event(), []
    with ScoringQueue(World(), lambda: False, overlap=True) as queue:
        queue.put(lambda: go_on.wait(10) and ran.append("first"))
        queue.put(lambda: ran.append("second"))
        go_on.set()
    assert ran == ["first", "second"]
