"""examples/quickstart.ipynb runs from its first cell to its last, shortened, in a process of its own."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from tests.warm import Program

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
RUN = """
import json, sys
output, cells = sys.argv[1], json.loads(open(sys.argv[2], encoding="utf-8").read())
scope = {"__name__": "__main__"}
for number, (source, is_parameters) in enumerate(cells):
    exec(compile(source, f"cell {number}", "exec"), scope)
    if is_parameters:
        scope |= {"STEPS": 1, "PROMPTS": 1, "HELD_OUT": 2, "OUTPUT": output}
assert scope["result"].stopped_by is None and scope["result_of_own"].stopped_by is None
"""


def cells() -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    found: list[dict[str, Any]] = book["cells"]
    return found


def test_it_is_kept_without_outputs() -> None:
    identities = [cell["id"] for cell in cells()]
    assert len(set(identities)) == len(identities) and all(re.fullmatch(r"[\w-]{1,64}", one) for one in identities)
    for cell in cells():
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))  # plain Python: nothing that only a notebook understands


def test_its_links_lead_somewhere() -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 5 and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_every_cell_runs(tmp_path: Path) -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    tagged = [("".join(cell["source"]), "parameters" in cell["metadata"].get("tags", ())) for cell in code]
    assert sum(flag for _, flag in tagged) == 1
    (tmp_path / "cells.json").write_text(json.dumps(tagged), encoding="utf-8")
    # in examples/, where Jupyter starts it
    program = Program("-c", RUN, str(tmp_path / "run"), str(tmp_path / "cells.json"), directory=NOTEBOOK.parent)
    done = program.ended(900)  # a bound on hanging: a minute and a half on a machine with other work
    assert done.returncode == 0, done.stdout + done.stderr
    assert "black 0.0\n" in done.stdout and "white 1.0\n" in done.stdout
    assert "mean reward of the first steps" in done.stdout
    assert (tmp_path / "run" / "samples" / "before_after.png").is_file()
    figures = (tmp_path / "run-own" / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"reward/Brightness"' in figures
