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


def rewritten(text: str) -> str:
    """The document with its table and its blocks as they are printed now."""
    text = TABLE.sub(lambda _: "\n".join(table()), text)
    return BLOCK.sub(lambda block: f"```\n$ glm-train {block['words']}\n{printed(block['words'].split())}```", text)


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
