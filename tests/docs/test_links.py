"""Every relative link and anchor of every Markdown file leads somewhere, as GitHub reads them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDDEN = re.compile(r"(^|/)(\.|build/|dist/|runs/)")
FILES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not HIDDEN.search(path.relative_to(ROOT).as_posix()) and "site-packages" not in path.parts
)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading: lower case, no marks but hyphens and underscores, spaces as hyphens."""
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """Those of the headings of a file; a heading that comes again is counted."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", without_blocks(path.read_text(encoding="utf-8")), flags=re.MULTILINE):
        first = slug(heading)
        again = sum(re.fullmatch(rf"{re.escape(first)}(-\d+)?", one) is not None for one in found)
        found.append(f"{first}-{again}" if again else first)
    return set(found)


def broken(path: Path) -> list[str]:
    """Links of a file that lead nowhere."""
    faults = []
    for link in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        target = (path.parent / place) if place else path
        if not target.exists():
            faults.append(link)
        elif anchor and anchor not in (anchors(target.resolve()) if target.suffix == ".md" else ()):
            faults.append(link)
    return faults


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_the_files_are_found_and_have_links() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"README.md", "docs/architecture.md", "examples/USAGE.md"} <= names
    assert sum(len(LINK.findall(path.read_text(encoding="utf-8"))) for path in FILES) > 100


def test_what_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A `key`, or *two*\n\n## Twice\n\n## Twice\n```\n# no heading\n```\n")
    (tmp_path / "a.md").write_text(
        "[1](b.md) [2](b.md#a-key-or-two) [3](b.md#twice-1) `[4](code.md)` [5](https://a.b/c)\n"
        "[6](c.md) [7](b.md#no-heading) [8](#nowhere) [9](b.md#twice-2)\n"
    )
    assert broken(tmp_path / "a.md") == ["c.md", "b.md#no-heading", "#nowhere", "b.md#twice-2"]
