"""Programs that start with their libraries loaded, in forks of a process that did nothing else: what tells the user
something, exits or meets a signal needs a process of its own, and ten seconds of imports for each it does not need."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm_libraries"])


class Program:
    """`python WORDS` (a file, `-m module` or `-c code`) in `directory`, with `changes` to the environment."""

    def __init__(self, *words: str, changes: Mapping[str, str] | None = None, directory: Path = ROOT) -> None:
        self.words, self._folder = words, TemporaryDirectory()
        self._told = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(changes or {})
        files = [str(path) for path in self._told]
        self.process: BaseProcess = FORKS.Process(target=_run, args=(words, environment, str(directory), files))
        with chdir(ROOT):  # from where the server, if this is its first one, finds what it loads
            self.process.start()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stdout(self) -> str:
        """What it has printed so far."""
        return self._told[0].read_text() if self._told[0].exists() else ""

    def until(self, seen: Callable[[], bool], seconds: float = 120) -> None:
        """Waits until `seen`, or the program ended."""
        deadline = time.monotonic() + seconds
        while not seen() and self.process.is_alive():
            assert time.monotonic() < deadline, self.words
            time.sleep(0.01)

    def ended(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """What it printed and its exit code, once it has ended."""
        self.process.join(seconds)
        alive = self.process.is_alive()
        if alive:
            self.process.kill()
            self.process.join()
        stdout, stderr = (path.read_text() for path in self._told)
        self._folder.cleanup()
        assert not alive, f"{self.words} did not end in {seconds} s:\n{stdout}\n{stderr}"
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess(self.words, self.process.exitcode, stdout, stderr)


def run(
    *words: str, changes: Mapping[str, str] | None = None, directory: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` prints, and its exit code."""
    return Program(*words, changes=changes, directory=directory).ended()


def run_two(*words: str, changes: Mapping[str, str] | None = None) -> list[subprocess.CompletedProcess[str]]:
    """The same of two processes that a launcher made one run of, by rank."""
    return run_group(2, *words, changes=changes)


def run_group(
    count: int, *words: str, changes: Mapping[str, str] | None = None, seconds: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """The same of `count` processes, which have so many seconds."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), **(changes or {})}
    group = [Program(*words, changes=meeting | {"RANK": rank, "LOCAL_RANK": rank}) for rank in map(str, range(count))]
    return [program.ended(seconds) for program in group]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(words: Sequence[str], environment: dict[str, str], directory: str, told: Sequence[str]) -> None:
    for number, path in enumerate(told, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    first, *arguments = words
    if first == "-c":
        sys.argv = [first, *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")
