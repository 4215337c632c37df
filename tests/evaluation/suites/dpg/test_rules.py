"""DPG-Bench's figures on recorded answers. `cases.jsonl`: an item each, with the scores of its tiles worked by hand, as
they are and before zeroing, some figures of levels (after, before), and one line of why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_training.evaluation.suites.dpg.rules import after_zeroing, levels, score

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text().splitlines()]


def record(case: dict, item: str = "x") -> dict:
    return {"picture": f"{item}.png", "item": item, "questions": case["questions"], "tiles": case["tiles"]}


@pytest.mark.parametrize("case", CASES, ids=[f"line{i}" for i in range(1, len(CASES) + 1)])
def test_the_scores_are_the_hand_worked_ones(case):
    scores = score([record(case)])
    assert scores.lines[0]["tiles"] == pytest.approx(case["tile_scores"], rel=1e-12), case["why"]
    figures = {figure.name: figure.value for figure in scores.figures}
    count = len(case["tiles"])
    assert figures["DPG score"] == pytest.approx(sum(case["tile_scores"]) / count, rel=1e-12)
    assert figures["before zeroing"] == pytest.approx(sum(case["before"]) / count, rel=1e-12)
    for level, (after, before) in case.get("levels", {}).items():
        assert figures[level] == pytest.approx(after, rel=1e-12), level
        assert figures[f"{level}, before zeroing"] == pytest.approx(before, rel=1e-12), level


def test_the_order_of_questions_does_not_matter():
    for case in CASES:
        turned = {**case, "questions": case["questions"][::-1]}
        assert score([record(turned)]).lines == score([record(case)]).lines


def test_long_and_branching_dependencies():
    """A chain of 3000 questions, and 60 in which each depends on the two before: 2^60 ways up."""
    chain = {question: [question - 1] if question else [] for question in range(3000)}
    assert after_zeroing(dict.fromkeys(chain, 1.0), chain) == dict.fromkeys(chain, 1.0)
    assert sum(after_zeroing(dict.fromkeys(chain, 1.0) | {1000: 0.0}, chain).values()) == 1000
    branching = {question: [q for q in (question - 1, question - 2) if q >= 0] for question in range(60)}
    assert sum(after_zeroing(dict.fromkeys(branching, 1.0) | {30: 0.0}, branching).values()) == 30


def test_every_picture_of_an_item_counts():
    question = {"id": 1, "parents": [], "tuple": "entity - whole (a)", "question": "?"}
    records = [
        {"picture": f"x.{place}.png", "item": "x", "questions": [question], "tiles": [{"1": answer}] * 4}
        for place, answer in enumerate(("yes", "no", "no"))
    ]
    figures = {figure.name: figure for figure in score(records).figures}
    assert [(figures[name].value, figures[name].count) for name in ("DPG score", "before zeroing")] == [
        (pytest.approx(1 / 3, rel=1e-12), 12)
    ] * 2


def test_a_picture_counts_as_much_as_another_however_many_questions_it_has():
    short = {
        "questions": [{"id": 1, "parents": [], "tuple": "entity - whole (a)", "question": "?"}],
        "tiles": [{"1": "no"}] * 4,
    }
    long = {
        "questions": [{"id": i, "parents": [], "tuple": "entity - whole (a)", "question": "?"} for i in range(1, 10)],
        "tiles": [{str(i): "yes" for i in range(1, 10)}] * 4,
    }
    scores = score([record(short, "a"), record(long, "b")])
    figures = {figure.name: figure for figure in scores.figures}
    assert figures["DPG score"].value == 0.5 and figures["DPG score"].count == 8
    assert figures["DPG score"].error == pytest.approx(0.5, rel=1e-12)  # two items, 0 and 1
    # of a level every answer counts alike: 36 of 40
    assert figures["L1 entity"].value == pytest.approx(0.9, rel=1e-12) and figures["L1 entity"].count == 40
    assert "first question" in scores.remarks[0]


def test_levels_of_the_benchmarks_tuples():
    assert levels("attribute - color (elf, green)") == ("attribute", "attribute - color")
    assert levels("global - ") == ("global", "global -")
    assert levels("relation - non-spatial (a, b)") == ("relation", "relation - non-spatial")
