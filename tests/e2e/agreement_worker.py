"""One process of a pair that is started under several configurations in turn: `main(folder, rank)`.

Reads `folder/cases.json`: for each case the environment, working directory, sys.path entry and arguments of each rank.
Writes `folder/told-<rank>.json`: exit code and standard error by case.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Exit code and standard error of train.py; what a rank's environment has in addition is taken away again."""
    before = dict(os.environ)
    os.environ.update(case["environment"])
    os.chdir(case["directory"])
    sys.path[:0] = case["path"]
    sys.argv = ["train.py", *case["arguments"]]
    errors = io.StringIO()
    code: Any = None
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        del sys.path[: len(case["path"])]
        os.environ.clear()
        os.environ.update(before)
    return {"code": code, "errors": errors.getvalue()}


def main(folder: Path, rank: int) -> None:
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    told = {name: run_case(ranks[rank]) for name, ranks in cases.items()}
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
