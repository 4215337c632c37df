"""Workers of the parity tests, on two gloo processes."""

from __future__ import annotations

from pathlib import Path

from tests.warm import run_two


def run_two_processes(worker: str, *arguments: str) -> None:
    """Runs the file `worker` of this folder as two processes of one run; AssertionError with all they told when one
    fails."""
    for done in run_two(str(Path(__file__).with_name(worker)), *arguments):
        assert done.returncode == 0, done.stdout + done.stderr
