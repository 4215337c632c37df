"""The page's tables are those of the cells that are committed."""

from __future__ import annotations

from typing import Any

from benchmarks.methods.__main__ import PAGE, cells
from benchmarks.methods.table import page, table


def test_the_tables_are_of_the_cells():
    """Else: python -m benchmarks.methods --table"""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, cells()) == text


def cell(rate: float, seed: int, gain: float) -> dict[str, Any]:
    """Of two held-out prompts, one of which gains twice as much as the other."""
    scores = {
        "total": [[0.5, 0.5], [0.5 + gain * 2 / 3, 0.5 + gain * 4 / 3]],
        "exactly_right": [[0.0, 0.0], [0.0, 1.0]],
    }
    steps = {"reward/total": [0.5, 0.5], "monitor/diversity": [0.2, 0.2], "clip_fraction": [0.002, 0.004]}
    return {
        **{"task": "words", "recipe": "nft", "rate": rate, "seed": seed, "shuffled": False, "minutes": 5.0},
        **{"scores": scores, "held_out": {"before": 0.5, "after": 0.5 + gain}, "reward_calls": 2000},
        **{"picture_change": 0.1, "steps": steps},
    }


def test_seeds_at_a_rate_that_the_search_did_not_choose_do_not_count():
    """Means and the 95 % interval of three seeds, 4.30 standard deviations / sqrt(3), by hand."""
    search = [cell(1e-4, 0, 0.1), cell(2e-4, 0, 0.3)]
    text = table([*search, *(cell(2e-4, seed, 0.1 * seed) for seed in (1, 2, 3)), cell(1e-4, 1, 9.0)])
    row = next(line for line in text.splitlines() if line.startswith("| `nft`"))
    assert row.split(" | ")[1:5] == ["0.0002", "3", "+0.200 ± 0.248", "+0.500 ± 0.000"]
    assert row.split(" | ")[6:8] == ["+0.100", "+0.040"]
    assert row.endswith("| 0.3% |")
    assert "| `nft` | +0.100 | **+0.300** |" in text
