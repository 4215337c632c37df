"""A few of the faults of a save by two processes; `FAULT_SWEEP=all` for all of them, as in the sweep of one process."""

from __future__ import annotations

import json
import os

from tests.faulty_saves import FAULTS, places
from tests.warm import Program

EVERY = 1 if os.environ.get("FAULT_SWEEP") == "all" else 120


def test_no_fault_of_one_takes_the_checkpoint_of_both(tmp_path) -> None:
    """In a process that has made no backward pass, which its forks would not bear."""
    out = tmp_path / "faults.json"
    done = Program("-m", "tests.parity.faults", "--out", str(out), "--every", str(EVERY)).ended(3600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["tried"] >= 2 and report["went_on"] >= 1 and report["wrong"] == []
    print(f"\n{report['tried']} of {report['possible']} faults; {report['outcomes']}")


def test_where_a_fault_can_happen() -> None:
    changes = [("mkdir", "run/states"), ("write", "run/states/a"), ("rename", "run/b"), ("write", "run/c")]
    wanted = {"torn write": [1, 3], "lost write": [1]}
    assert {kind: places(changes, kind) for kind in FAULTS} == {kind: wanted.get(kind, [0, 1, 2, 3]) for kind in FAULTS}
