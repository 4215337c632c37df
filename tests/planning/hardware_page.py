"""docs/hardware.md as the commands that it names print it.

python -m tests.planning.hardware_page       writes it anew
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.plan_table import table
from glm_training.cli import main as program

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/hardware.md"
BLOCK = re.compile(r"```\n\$ glm-train (?P<words>plan [^\n]*)\n(?P<text>.*?)```", re.DOTALL)
TABLE = re.compile(r"\| what is trained \|.*?(?=\n\n)", re.DOTALL)
GAP = "[...]"
"""Stands in a block for paragraphs that the page leaves out."""
LOCAL = "free where they go:"
"""How the line begins that tells of this machine's disk."""


def printed(words: list[str]) -> str:
    """What a command prints but for this machine's disk; run from the root of the repository."""
    before, told = sys.argv, io.StringIO()
    sys.argv = ["glm-train", *words]
    try:
        with redirect_stdout(told):
            program.main()
    except SystemExit:
        pass
    finally:
        sys.argv = before
    return "".join(line for line in told.getvalue().splitlines(keepends=True) if not line.startswith(LOCAL))


def excerpt(whole: str, shown: str) -> str:
    """Of the paragraphs of `whole` those that `shown` has, told by their first words; all where it has no gap. Raises
    KeyError where one is no longer printed."""
    if GAP not in shown.splitlines():
        return whole
    paragraphs = {_first_word(each): each for each in whole.strip("\n").split("\n\n")}
    wanted = [_first_word(each) for each in shown.strip("\n").split("\n\n")]
    return "\n\n".join(GAP if word == GAP else paragraphs[word] for word in wanted) + "\n"


def _first_word(paragraph: str) -> str:
    return paragraph.split(maxsplit=1)[0].lower()


def rewritten(text: str) -> str:
    """The document with its table and its blocks as they are printed now."""

    def block(found: re.Match[str]) -> str:
        words = found["words"]
        return f"```\n$ glm-train {words}\n{excerpt(printed(words.split()), found['text'])}```"

    return BLOCK.sub(block, TABLE.sub(lambda _: "\n".join(table()), text))


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
