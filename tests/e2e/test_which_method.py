"""The page's tables are those of the cells that are committed."""

from __future__ import annotations

from benchmarks.methods.__main__ import PAGE, cells
from benchmarks.methods.table import page


def test_the_tables_are_of_the_cells():
    """Else: python -m benchmarks.methods --table"""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, cells()) == text
