"""What a run tells of samples without a score, and of steps that teach nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from glm_training.reinforcement import remarks
from glm_training.reinforcement.remarks import FlatSteps, MissingScores
from glm_training.rewards import RewardError
from glm_training.utils.distributed import World


def chunk(*prompts: str, failures: dict[int, str], group: int = 2) -> SimpleNamespace:
    """`group` samples for each of the prompts, those at `failures` without a score."""
    total = torch.ones(len(prompts) * group)
    total[sorted(failures)] = math.nan
    return SimpleNamespace(
        rollout=SimpleNamespace(prompts=list(prompts)), result=SimpleNamespace(total=total, failures=failures)
    )


def skipped(count: int) -> dict[str, float]:
    return {"reward/skipped_samples": float(count)}


def test_the_first_reason_is_told_with_its_prompt_and_how_many_were_left_out():
    told = MissingScores(World())
    told.look(1, [chunk("a", "b", failures={})], skipped(0))
    assert told.read() == []
    chunks = [chunk("a", "b", failures={}), chunk("c", "d", failures={3: "no face", 2: "two faces"})]
    told.look(7, chunks, skipped(2))
    (line,) = told.read()
    assert line.startswith("without a score: 2 of the 8 samples of step 7, left out as reward.on_error: skip says.")
    assert "The first, of the prompt 'd': two faces." in line
    assert told.read() == []


def test_reasons_of_one_kind_are_told_once_and_no_more_than_five_kinds():
    told = MissingScores(World())
    lines = []
    for step, reason in enumerate(("face 1", "face 23", "sign", "no cat", "no dog", "no sky", "no sea"), start=1):
        told.look(step, [chunk("a", "b", failures={1: reason})], skipped(1))
        lines += told.read()
    assert [line.partition("of the prompt 'a': ")[2].split(".")[0] for line in lines] == [
        "face 1", "sign", "no cat", "no dog", "no sky",
    ]  # fmt: skip
    assert [line.split("of step ")[1].split(",")[0] for line in lines] == ["1", "3", "4", "5", "6"]


def test_a_step_without_any_score_ends_the_run_and_one_with_a_single_score_does_not():
    told = MissingScores(World())
    told.look(3, [chunk("a", "b", failures={0: "x", 1: "y", 3: "z"})], skipped(3))
    assert "3 of the 4 samples of step 3" in told.read()[0]
    every = {0: "x", 1: "y", 2: "z", 3: "w"}
    with pytest.raises(RewardError, match=r"not one of the 4 samples of step 4 has a score .*, of the prompt 'a': x"):
        told.look(4, [chunk("a", "b", failures=every)], skipped(4))


def test_the_samples_of_all_processes_count(monkeypatch):
    """This process has scores for all of its samples; the other one for none of its 4."""
    other = (4, "of the prompt 'far': away")
    monkeypatch.setattr(remarks, "gather_objects", lambda world, own: [own, other])
    told = MissingScores(World(0, 2))
    told.look(2, [chunk("a", "b", failures={})], skipped(4))
    assert (
        "4 of the 8 samples of step 2" in (line := told.read()[0]) and "The first, of the prompt 'far': away." in line
    )


def test_the_fifth_flat_step_in_a_row_is_told_and_what_was_counted_survives_a_resume():
    flat, lines = FlatSteps(), []
    for groups in (3, 2, 3, 3, 3, 3, 3, 3):  # of three prompts; the second step breaks the row
        flat.look(3, {"reward/zero_spread_groups": float(groups)})
        lines.append(flat.read(last=False))
        again = FlatSteps()
        again.load(flat.state())
        flat = again
    assert [len(line) for line in lines] == [0, 0, 0, 0, 0, 0, 1, 0] and lines[6][0].startswith("in 5 steps in a row")
    assert flat.state() == [6, 8, 1]
