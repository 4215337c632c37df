"""DPG-Bench's figures, as functions of recorded answers and of nothing else.

Of an item, ``questions`` are ``{"id": 2, "parents": [1], "tuple": "attribute - color (elf, green)", "question": "."}``
and ``tiles`` the answers to them, ``{"1": "yes", "2": "no"}``, one for each tile of the picture. As in the public
script (github.com/TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`) an answer counts where it is "yes", a question
whose parent does not count counts neither, a tile scores the mean over its questions, a picture that over its tiles,
and the level figures are means over answers. Other than there the first question of the file is asked too, all tiles
enter the level figures, and these are given before and after children are zeroed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glm_training.evaluation.suites.protocol import Figure, Record, Scores, mean_of

REMARK = (
    "Every question and every tile counts. The public script leaves out the first question of the file, and takes the "
    "level figures of the last tile alone, before zeroing."
)


def is_yes(answer: str) -> bool:
    """Whether an answer counts: "yes" and nothing else, whatever its case."""
    return answer.strip().strip(".!").lower() == "yes"


def levels(named: str) -> tuple[str, str]:
    """A tuple's category of the first and of the second level: "attribute - color (elf, green)" is of ("attribute",
    "attribute - color")."""
    second = named.split("(")[0].strip()
    return second.split("-")[0].strip(), second


def before_zeroing(answers: Mapping[str, str]) -> dict[int, float]:
    """Question -> 1 for a yes, else 0."""
    return {int(question): float(is_yes(answer)) for question, answer in answers.items()}


def after_zeroing(scores: Mapping[int, float], parents: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """The same, 0 where a parent, or a parent of that, is 0. The order of the questions does not matter."""
    holding = {question for question, value in scores.items() if value > 0}
    while lost := {question for question in holding if not holding.issuperset(parents[question])}:
        holding -= lost
    return {question: float(question in holding) for question in scores}


def score(records: Sequence[Record]) -> Scores:
    """The score, and the figures of both levels. Standard errors are over items."""
    zeroed: dict[Any, list[float]] = {}
    plain: dict[Any, list[float]] = {}
    by_level: dict[str, dict[str, dict[Any, list[float]]]] = {}
    lines = []
    for record in records:
        item = record["item"]
        parents = {question["id"]: question["parents"] for question in record["questions"]}
        kinds = {question["id"]: levels(question["tuple"]) for question in record["questions"]}
        tiles = []
        for answers in record["tiles"]:
            before = before_zeroing(answers)
            after = after_zeroing(before, parents)
            tiles.append(math.fsum(after.values()) / len(after))
            plain.setdefault(item, []).append(math.fsum(before.values()) / len(before))
            for question, (first, second) in kinds.items():
                for level in (f"L1 {first}", f"L2 {second}"):
                    groups = by_level.setdefault(level, {"before": {}, "after": {}})
                    groups["before"].setdefault(item, []).append(before[question])
                    groups["after"].setdefault(item, []).append(after[question])
        zeroed.setdefault(item, []).extend(tiles)  # an item may have several pictures
        lines.append({"picture": record["picture"], "tiles": tiles, "score": math.fsum(tiles) / len(tiles)})
    figures = [
        mean_of("DPG score", zeroed, of="tiles", scale=100),
        mean_of("before zeroing", plain, of="tiles", scale=100),
    ]
    return Scores([*figures, *_levels(by_level)], lines, [REMARK])


def _levels(by_level: Mapping[str, Mapping[str, Mapping[Any, list[float]]]]) -> list[Figure]:
    figures = []
    for level in sorted(by_level):
        figures.append(mean_of(level, by_level[level]["after"], of="answers", scale=100))
        figures.append(mean_of(f"{level}, before zeroing", by_level[level]["before"], of="answers", scale=100))
    return figures
