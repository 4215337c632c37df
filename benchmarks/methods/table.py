"""The cells of benchmarks/results/methods as Markdown, for docs/which_method.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Two-sided 95 % quantiles of Student's t, by the number of seeds."""
HEADS = (
    *("recipe", "rate", "seeds", "held-out reward", "exactly right", "shuffled", "per 1,000 calls", "per minute"),
    *("pictures changed", "diversity left", "training - held-out", "clipped"),
)
ENDS = 5
"""Steps at either end of a run that are averaged."""


MARK = "<!-- python -m benchmarks.methods --table -->\n"
"""Behind this line the page has the tables, to its end."""


def page(text: str, cells: Sequence[dict[str, Any]]) -> str:
    """The page `text` with the tables of `cells`."""
    return text.partition(MARK)[0] + MARK + table(cells)


def table(cells: Sequence[dict[str, Any]]) -> str:
    """A table per task: the recipes by their gain, at the rate that the search found; then the search."""
    text = ""
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]
        searched = [cell for cell in own if cell["seed"] == 0]
        best = {recipe: best_rate(found) for recipe, found in _by_recipe(searched)}
        judged = [cell for cell in own if cell["seed"] > 0 and cell["rate"] == best.get(cell["recipe"], cell["rate"])]
        rows = [_row(recipe, list(found)) for recipe, found in _by_recipe(judged)]
        rows.sort(key=lambda row: -float(row[3].split()[0]))
        text += f"\n**{task}**\n"
        if rows:
            text += f"\n| {' | '.join(HEADS)} |\n" + "|---" * len(HEADS) + "|\n"
            text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
        text += _search(searched)
    return text


def _by_recipe(cells: Iterable[dict[str, Any]]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(cell["recipe"] for cell in cells)
    return [(name, [cell for cell in cells if cell["recipe"] == name]) for name in names]


def _row(recipe: str, cells: list[dict[str, Any]]) -> list[str]:
    trained = [cell for cell in cells if not cell["shuffled"]]
    shuffled = [cell for cell in cells if cell["shuffled"]]
    gains = [_gain(cell, "total") for cell in trained]
    calls = statistics.fmean(cell["reward_calls"] for cell in trained) / 1000
    minutes = statistics.fmean(cell["minutes"] for cell in trained)
    trained_gains = [_course(cell, "reward/total") for cell in trained]
    gap = statistics.fmean(trained_gains) - statistics.fmean(gains)
    gain = statistics.fmean(gains)
    return [
        f"`{recipe}`",
        f"{cells[0]['rate']:g}",
        str(len(trained)),
        _interval(gains),
        _interval([_gain(cell, "exactly_right") for cell in trained]),
        _interval([_gain(cell, "total") for cell in shuffled]),
        f"{gain / calls:+.3f}",
        f"{gain / minutes:+.3f}",
        f"{statistics.fmean(cell['picture_change'] for cell in trained):.2f}",
        f"{statistics.fmean(_kept(cell, 'monitor/diversity') for cell in trained):.0%}",
        f"{gap:+.3f}",
        _clipped(trained),
    ]


def _gain(cell: dict[str, Any], score: str) -> float:
    before, after = cell["scores"][score]
    return statistics.fmean(b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None)


def _interval(gains: Sequence[float]) -> str:
    """Mean and half the 95 % interval over seeds."""
    if not gains:
        return "-"
    if len(gains) not in T_95:
        return f"{gains[0]:+.3f}"
    half = T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{statistics.fmean(gains):+.3f} ± {half:.3f}"


def _ends(cell: dict[str, Any], name: str) -> tuple[float, float]:
    values = [value for value in cell["steps"][name] if value is not None]
    return statistics.fmean(values[:ENDS]), statistics.fmean(values[-ENDS:])


def _course(cell: dict[str, Any], name: str) -> float:
    first, last = _ends(cell, name)
    return last - first


def _kept(cell: dict[str, Any], name: str) -> float:
    first, last = _ends(cell, name)
    return last / first


def _clipped(cells: Sequence[dict[str, Any]]) -> str:
    """The clipped share of the trained half's ratios over the last steps."""
    courses = [[value for value in cell["steps"]["clip_fraction"] if value is not None] for cell in cells]
    last = [statistics.fmean(course[-ENDS:]) for course in courses if course]
    return f"{statistics.fmean(last):.1%}" if last else "-"


def held_out_gain(cell: dict[str, Any]) -> float:
    """By how much the mean reward of held-out prompts rose."""
    return float(cell["held_out"]["after"] - cell["held_out"]["before"])


def best_rate(cells: Iterable[dict[str, Any]]) -> float:
    """The rate of the cells of a search with the largest held-out gain."""
    return float(max(cells, key=held_out_gain)["rate"])


def _search(cells: Sequence[dict[str, Any]]) -> str:
    """A table of the held-out gain by recipe and rate, the rate that was taken in bold."""
    if not cells:
        return ""
    rates = sorted({cell["rate"] for cell in cells})
    text = "\nThe search, one seed: held-out gain by rate, the largest in bold.\n\n"
    text += f"| recipe | {' | '.join(f'{rate:g}' for rate in rates)} |\n" + "|---" * (len(rates) + 1) + "|\n"
    for recipe, found in _by_recipe(cells):
        gains, best = {cell["rate"]: held_out_gain(cell) for cell in found}, best_rate(found)
        shown = {rate: f"**{gain:+.3f}**" if rate == best else f"{gain:+.3f}" for rate, gain in gains.items()}
        text += f"| `{recipe}` | {' | '.join(shown.get(rate, '-') for rate in rates)} |\n"
    return text
