"""Figures as a file and as a table of at most 80 columns."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from glm_training.evaluation.suites.protocol import Figure, Scores
from glm_training.utils.words import ABSENT, number

WIDTH = 80


def results(
    suite: str, scores: Scores, settings: Mapping[str, Any], *, pictures: int, failures: Mapping[str, str]
) -> str:
    """`results.json`: everything that a reader may ask of the figures."""
    judge = settings.get("judge", {}).get("judge")
    report = {
        "suite": suite,
        "judge": judge,
        "figures": [_plain(figure) | {"judge": judge} for figure in scores.figures],
        "pictures": pictures,
        "judged": pictures - len(failures),
        "failures": dict(failures),
        "remarks": scores.remarks,
        "settings": dict(settings),
    }
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(figure: Figure) -> dict[str, Any]:
    """For JSON, which has no infinity: a text stands for it."""
    infinite = figure.value is not None and math.isinf(figure.value)
    return asdict(figure) | ({"value": str(figure.value)} if infinite else {})


def table(suite: str, scores: Scores, judge: str) -> list[str]:
    """Lines of at most 80 columns: each figure with its standard error and over how many it is."""
    rows = [("", "value", "+-", "over")]
    for figure in scores.figures:
        digits = ".1f" if figure.scale == 100 else ".3f"
        value, error = (None if part is None else part * figure.scale for part in (figure.value, figure.error))
        over = f"{figure.count} {figure.of}" if figure.count else ABSENT
        rows.append((figure.name, number(value, digits), number(error, digits), over))
    widths = [max(len(row[column]) for row in rows) for column in range(1, 4)]
    first = min(max(len(row[0]) for row in rows), WIDTH - sum(widths) - 6)
    lines = [*_folded(f"{suite}, judged by {judge} (+-: standard error)")]
    for name, *cells in rows:
        *above, last = textwrap.wrap(name, first) or [""]
        lines += above
        cells = [cell.rjust(width) for cell, width in zip(cells[:2], widths, strict=False)] + [cells[2]]
        lines.append("  ".join([last.ljust(first), *cells]).rstrip())
    for remark in scores.remarks:
        lines += _folded(remark)
    return lines


def _folded(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)
