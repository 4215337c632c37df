"""GenEval's rules, as functions of what a detector found and of nothing else.

A detection is ``{"class": "bench", "score": .97, "box": [x0, y0, x1, y1]}`` in pixels, y down; where a colour is
asked for it has ``"colors": {"red": .8, ...}`` too. The rules are those of the public evaluator
(github.com/djghosh13/geneval, `evaluation/evaluate_images.py`) with its default options:

* a detection counts above a score of .3, or of .9 where the tag is `counting`; of a class the 16 of the highest scores;
  overlapping ones are all kept (its `max_overlap` is 1);
* `include`: of each class at least `count`, of which the `count` best are looked at further: each of them must have the
  colour that is asked for, and stand as asked to each of the objects that an earlier clause matched;
* `exclude`: fewer than `count` of a class;
* all clauses must hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
POSITION_MARGIN = 0.1
OFFSET = 0.5
SAME_PLACE = 1e-3
"""Pixels; a smaller offset is none."""

Detection = Mapping[str, Any]


def counted_objects(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """class -> the detections that count for a prompt of this tag, best first; of equal scores the first found."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection["score"]):
        if detection["score"] > threshold:
            found.setdefault(detection["class"], []).append(detection)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def colored_objects(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> list[tuple[Detection, str]]:
    """The detections whose colour the rules will ask for, with their class; each once."""
    objects = counted_objects(detections, metadata["tag"])
    wanted: dict[int, tuple[Detection, str]] = {}
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(found) == clause["count"]:
            wanted |= {id(detection): (detection, clause["class"]) for detection in found}
    return list(wanted.values())


def color_of(detection: Detection) -> str:
    """The likeliest colour; of equally likely ones the first of `COLORS`."""
    return max(COLORS, key=lambda color: detection["colors"].get(color, 0.0))


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How the object in `box` stands to the one in `other`.

    The offset of the centres, each axis shortened by .1 of both objects' extent there (not below 0), over the length of
    the whole offset: an axis counts above .5. So near objects have no relation, and one at a slant may have two.
    """
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        along = (box[low] + box[high]) / 2 - (other[low] + other[high]) / 2
        margin = POSITION_MARGIN * (abs(box[high] - box[low]) + abs(other[high] - other[low]))
        offset.append(along)
        shortened.append(math.copysign(max(abs(along) - margin, 0.0), along))
    if all(abs(along) < SAME_PLACE for along in shortened):
        return set()
    x, y = (along / math.hypot(*offset) for along in shortened)
    holds = {"left of": x < -OFFSET, "right of": x > OFFSET, "above": y < -OFFSET, "below": y > OFFSET}
    return {name for name, true in holds.items() if true}


def verdict(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a picture shows what its prompt's `metadata` ask for, and every reason why not."""
    objects = counted_objects(detections, metadata["tag"])
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], [])[: clause["count"]]
        reason = _missed(clause, found, matched)
        matched.append(found if reason is None else None)
        if reason is not None:
            reasons.append(reason)
    for clause in metadata.get("exclude", ()):
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"{number} of {clause['class']} where fewer than {clause['count']} are asked for")
    return not reasons, reasons


def _missed(
    clause: Mapping[str, Any], found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]
) -> str | None:
    """Why the best objects of the clause's class do not fulfil it; None where they do."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"{len(found)} of {name} where {count} are asked for"
    if "color" in clause:
        colors = [color_of(detection) for detection in found]
        if colors.count(clause["color"]) < count:
            return f"{name} is {', '.join(colors)} and not {clause['color']}"
    if "position" not in clause:
        return None
    relation, place = clause["position"]
    targets = matched[place]
    if targets is None:
        return f"nothing that {name} could be {relation}"
    for detection in found:
        for target in targets:
            holding = relations(detection["box"], target["box"])
            if relation not in holding:
                return f"{name} is {' and '.join(sorted(holding)) or 'in no relation'} and not {relation}"
    return None
