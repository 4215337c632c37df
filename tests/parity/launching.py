"""Workers of the parity tests, on gloo processes."""

from __future__ import annotations

from pathlib import Path

from tests.warm import run_group


def run_two_processes(worker: str, *arguments: str) -> None:
    """Runs the file `worker` of this folder as two processes of one run; AssertionError with all they told when one
    fails."""
    run_processes(2, worker, *arguments)


def run_processes(count: int, worker: str, *arguments: str, seconds: float = 240) -> None:
    """The same as `count` processes, which have so many seconds."""
    for done in run_group(count, str(Path(__file__).with_name(worker)), *arguments, seconds=seconds):
        assert done.returncode == 0, done.stdout + done.stderr
