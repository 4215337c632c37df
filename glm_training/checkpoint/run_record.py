"""``run.json``: whose a folder is. Every folder that a run writes to has one, but for shared caches."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """The run that a folder belongs to.

    ``run``: its id, as its checkpoints have it. ``started``: local time, for people. ``checkpoints``: the folder of its
    checkpoints, as it is reached from here.
    """

    run: str
    started: str
    checkpoints: str

    @staticmethod
    def read(folder: Path) -> RunRecord | None:
        """The record in a folder; None where there is none that can be read."""
        try:
            content = json.loads((folder / RECORD).read_bytes())
            return RunRecord(*(str(content[name]) for name in ("run", "started", "checkpoints")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """Appears whole or not at all."""
        fresh = folder / f".{RECORD}.new"
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, folder / RECORD)
