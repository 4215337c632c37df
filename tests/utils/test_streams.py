"""Standard streams whose reader goes away: nothing is raised, and the exit code stays."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_training.utils.console import Console
from glm_training.utils.failures import begin_telling
from glm_training.utils.streams import surviving

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from glm_training.utils.streams import guard_standard_streams
guard_standard_streams()
from glm_training.utils.console import Console
console = Console()
with open(sys.argv[1], "w") as file:  # with its number free, this would be standard output or standard error
    for number in range(4000):
        console.line(f"line {number}")
        print("a reward of the user's own")
    console.error("the end")
    console.table("a table", ["a"], [[1]])
    file.write("whole")
sys.exit(4)
"""


@pytest.fixture(autouse=True)
def told_anew():
    begin_telling()


@pytest.mark.parametrize(
    "redirection", ["| head -n 1", "2>&1 | head -n 1", ">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full", "2> /dev/full"]
)
def test_a_program_outlives_whoever_reads_it(tmp_path, redirection):
    told, written = tmp_path / "stderr", tmp_path / "file"
    command = f'{sys.executable} -c "$PROGRAM" {written} {redirection}'
    environment = os.environ | {"PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)}
    with told.open("wb") as errors:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=60,
        )
    assert done.returncode == 4
    assert written.read_text() == "whole"
    assert "Traceback" not in told.read_text() and "Exception ignored" not in told.read_text()
    if "head" in redirection:
        assert done.stdout == b"line 0\n"


class Failing(io.StringIO):
    """A stream that fails until it is mended."""

    error: Exception | None = OSError(errno.ENOSPC, "No space left on device")

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("I/O operation on closed file")])
def test_text_that_cannot_be_written_is_dropped_and_what_can_later_is_written(caplog, error):
    stream = Failing()
    stream.error = error
    console = Console(output=stream)
    console.line("one")
    console.table("two", ["a", "b"], [[1, 2]])
    stream.error = None
    console.line("three")
    assert stream.getvalue() == "three\n"
    assert len(caplog.records) == 1 and "the run goes on without it" in caplog.text


def test_the_bar_of_a_terminal_that_went_away(monkeypatch):
    class Terminal(Failing):
        error = OSError(errno.EIO, "Input/output error")

        def isatty(self) -> bool:
            return True

    console = Console(output=Terminal())
    with console.progress(3) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"reward/total": 0.5})
    console.table("scores", ["a", "b"], [[1, 2]])


def test_a_stream_is_wrapped_once():
    stream = io.StringIO()
    assert surviving(surviving(stream)) is not stream
    assert surviving(surviving(stream))._stream is stream  # type: ignore[attr-defined]


CLOSED = """
import io, logging, sys
from glm_training.utils.streams import guard_standard_streams
real, sys.stderr = sys.stderr, io.TextIOWrapper(io.BytesIO())
guard_standard_streams()
handler = logging.StreamHandler()  # as a library keeps one, bound to what standard error is now
handler.flush = sys.stderr.flush
logging.getLogger("library").addHandler(handler)
sys.stderr.close()
sys.stderr = real
if sys.argv[1:]:
    handler.stream.write("a line")
"""


@pytest.mark.parametrize("written", [False, True])
def test_a_stream_that_was_closed_has_lost_only_what_is_written_to_it(written):
    """Python flushes the handlers of libraries as it ends."""
    command = [sys.executable, "-c", CLOSED, *["write"] * written]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert done.returncode == 0 and (b"the run goes on without it" in done.stderr) == written, done.stderr
