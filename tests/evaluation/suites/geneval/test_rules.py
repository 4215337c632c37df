"""GenEval's rules on recorded detections. `cases.jsonl`: each with the answer worked by hand from the published rules,
and one line of why."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from glm_training.evaluation.suites.geneval.rules import TAGS, colored_objects, relations, verdict
from glm_training.evaluation.suites.geneval.suite import score

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text().splitlines()]


def test_every_tag_has_cases_of_both_kinds():
    found = Counter((case["tag"], case["right"]) for case in CASES)
    assert len(CASES) >= 40 and all(found[tag, right] >= 2 for tag in TAGS for right in (True, False))


@pytest.mark.parametrize("case", CASES, ids=[f"{case['tag']}-line{i}" for i, case in enumerate(CASES, 1)])
def test_the_verdict_is_the_hand_worked_one(case):
    right, reasons = verdict(case["detections"], case)
    assert right is case["right"], case["why"]
    assert bool(reasons) is not right
    if "reason" in case:
        assert case["reason"] in " | ".join(reasons)


def test_the_order_in_which_objects_were_found_does_not_matter():
    for case in CASES:
        assert verdict(case["detections"][::-1], case)[0] is case["right"]


def test_an_object_opposite_to_another_has_the_opposite_relation():
    here, there = [0.0, 0.0, 10.0, 30.0], [40.0, 50.0, 80.0, 60.0]
    opposite = {"left of": "right of", "above": "below"}
    assert relations(here, there) == set(opposite) == {"left of", "above"}
    assert relations(there, here) == set(opposite.values())


def test_an_offset_of_less_than_a_thousandth_past_the_margin_is_none():
    assert relations([0, 0, 20, 20], [4.0005, 0, 24.0005, 20]) == set()
    # margin 0: what is left of an offset of .002 is all of it
    assert relations([0, 0, 0, 0], [0.002, 0, 0.002, 0]) == {"left of"}


def test_colours_are_asked_of_the_objects_that_the_rules_look_at_and_of_no_others():
    metadata = {"tag": "color_attr", "include": [
        {"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1},
        {"class": "cat", "count": 2, "color": "white"}, {"class": "cup", "count": 1, "color": "pink"},
    ]}  # fmt: skip
    found = [
        {"class": name, "score": s, "box": [0, 0, 1, 1]}
        for name, s in (("car", 0.4), ("car", 0.9), ("dog", 0.9), ("cat", 0.9), ("cup", 0.3))
    ]
    # the best car; no dog, whose colour nobody asks for; one cat where two are asked for, and no cup above .3
    assert colored_objects(found, metadata) == [(found[1], "car")]


def picture(index: int, sample: int, tag: str, right: bool) -> dict:
    found = [{"class": "car", "score": 0.95 if right else 0.1, "box": [0, 0, 1, 1], "colors": {"red": 1.0}}]
    metadata = {"tag": tag, "include": [{"class": "car", "count": 1}], "prompt": f"prompt {index}"}
    name = f"{index:05d}/samples/{sample:04d}.png"
    return {"picture": name, "index": index, "sample": sample, "metadata": metadata, "detections": found}


def test_the_overall_figure_is_the_mean_over_tags_and_not_over_pictures():
    # one prompt of two pictures for each tag, both right but for position, where 4 prompts have one right of two
    records = [picture(i, s, tag, True) for i, tag in enumerate(t for t in TAGS if t != "position") for s in (0, 1)]
    records += [picture(i, s, "position", s == 0) for i in (5, 6, 7, 8) for s in (0, 1)]
    figures = {figure.name: figure for figure in score(records).figures}
    assert {tag: figures[tag].value for tag in TAGS} == {tag: 0.5 if tag == "position" else 1.0 for tag in TAGS}
    assert figures["overall"].value == pytest.approx(5.5 / 6, rel=1e-12)
    assert figures["right pictures"].value == pytest.approx(14 / 18, rel=1e-12)
    assert figures["prompts with a right picture"].value == 1.0
    assert (figures["position"].count, figures["overall"].count) == (8, 6)


def test_the_overall_error_is_that_of_a_mean_of_independent_tags():
    # each tag: prompts (1, 1) and (0, 0), so an error of 1/2 (see test_stages); sqrt(6 / 4) / 6
    records = [
        picture(2 * place + which, sample, tag, which == 0)
        for place, tag in enumerate(TAGS)
        for which in (0, 1)
        for sample in (0, 1)
    ]
    figures = {figure.name: figure for figure in score(records).figures}
    assert figures["counting"].error == pytest.approx(0.5, rel=1e-12)
    assert figures["overall"].error == pytest.approx(1.5**0.5 / 6, rel=1e-12)


def test_a_tag_without_pictures_is_said_and_the_mean_is_not_called_overall():
    scores = score([picture(0, 0, "colors", True), picture(1, 0, "counting", False)])
    names = [figure.name for figure in scores.figures]
    assert "mean of 2 tags" in names and "overall" not in names
    assert scores.remarks == [
        "No pictures of single_object, two_object, position, color_attr: the overall figure is not GenEval's."
    ]


def test_a_line_of_results_is_what_the_public_summary_reads():
    (line,) = score([picture(3, 1, "colors", False)]).lines
    assert (line["filename"], line["tag"], line["correct"]) == ("00003/samples/0001.png", "colors", False)
    assert json.loads(line["metadata"])["prompt"] == line["prompt"] == "prompt 3"
    assert line["reason"] == "0 of car where 1 are asked for"
    assert json.loads(line["details"]) == {"car": [[0, 0, 1, 1, 0.1]]}
