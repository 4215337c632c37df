"""The page on hardware is what `glm-train plan` prints."""

from __future__ import annotations

from tests.planning.hardware_page import BLOCK, DOCUMENT, ROOT, TABLE, rewritten


def test_the_page_is_what_the_commands_print(monkeypatch):
    """Else: python -m tests.planning.hardware_page"""
    monkeypatch.chdir(ROOT)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(TABLE.findall(text)) == 1 and len(BLOCK.findall(text)) == 4
    assert rewritten(text) == text
