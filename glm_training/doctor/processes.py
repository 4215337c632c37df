"""Other processes, which may crash or hang: their checks one by one, and whole commands, each within a time limit."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from glm_training.doctor.commands import ROOT, Asked, glm_train, is_clone, reinstall
from glm_training.doctor.findings import Finding, failed

LONGEST = 86_400.0
"""Seconds that a check can be given."""

LINES_KEPT = 20
"""Of what a process writes to standard error."""

OF_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_")
"""Beginnings of the variables by which processes find the others of their run."""

AFTER_A_FAULT = 30.0
"""Seconds that processes have to end once another one of them failed."""


@dataclass(frozen=True)
class Ended:
    """A command that ended, or was stopped at its limit (code None); `told` is the end of what it wrote."""

    code: int | None
    told: list[str]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of this process, in which the package is found as it is here, and which belongs to no launcher's run."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    found |= {"ORT_DISABLE_TELEMETRY": "1", **(changes or {})}  # onnxruntime 1.32 would leave an id in the home folder
    with suppress(FileNotFoundError):  # torch makes a folder for its compiler, which has nothing to do here
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    if is_clone():
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [found.get("PYTHONPATH"), str(ROOT)]))
    return found


def module(name: str, *words: str) -> list[str]:
    """A module of this Python as a program; what lies in the current folder does not stand in for a library."""
    return [sys.executable, "-P", "-m", name, *words]


def run_together(
    command: Sequence[str], changes: Sequence[Mapping[str, str]], limit: float, folder: Path
) -> list[Ended]:
    """Processes of one command, each with its changes to the environment, in `folder`; all are stopped where one is not
    done after `limit` seconds."""
    started = [_start(command, folder, environment(own)) for own in changes]
    watches = [_Tail(process.stderr) for process in started]
    deadline, late = time.monotonic() + limit, False
    try:
        while any(process.poll() is None for process in started) and not late:
            time.sleep(0.05)
            late = time.monotonic() > deadline
            if any(process.poll() not in (None, 0) for process in started):  # the others may have their say
                deadline = min(deadline, time.monotonic() + AFTER_A_FAULT)
    finally:
        for process in started:
            _kill(process)
    faulty = any(process.wait() > 0 for process in started)
    return [
        Ended(None if late and not faulty else process.wait(), watch.lines())
        for process, watch in zip(started, watches, strict=True)
    ]


def look(checks: Sequence[str], asked: Asked, limit: float) -> Iterator[Finding]:
    """What `worker.CHECKS` of these names find. A check that crashes its process, or takes longer than `limit` seconds,
    is a finding itself, and the others go on in a new process."""
    left = list(checks)
    while left:
        watched = _Worker(left, asked)
        try:
            for told in watched.messages(limit):
                if "finding" in told:
                    yield Finding(**{**told["finding"], "command": tuple(told["finding"]["command"])})
                elif "end" in told:
                    left.remove(told["end"])
        finally:
            ended = watched.stop()
        if left:  # it did not come to its end
            name = left.pop(0)
            yield _lost(name, ended, limit, asked)


def slow(name: str, limit: float, asked: Asked) -> Finding:
    """What did not end in time."""
    if limit >= LONGEST:
        return failed(name, f"it did not end within {limit:g} s", reinstall(), stopped_after=limit)
    command = glm_train("doctor", asked, "--time-limit", f"{min(4 * limit, LONGEST):g}")
    return failed(name, f"it was stopped after {limit:g} s; to give it longer:", command, stopped_after=limit)


def _lost(name: str, ended: Ended, limit: float, asked: Asked) -> Finding:
    if ended.code is None:
        return slow(name, limit, asked)
    last = ended.told[-1] if ended.told else "it wrote nothing"
    return failed(name, f"its process ended with code {ended.code}: {last}", reinstall(), crashed=True)


class _Worker:
    """A process that tells what it does, a JSON object a line."""

    def __init__(self, checks: Sequence[str], asked: Asked) -> None:
        self._process = _start(module("glm_training.doctor.worker"), None, environment(), talks=True)
        assert self._process.stdin is not None
        self._stderr = _Tail(self._process.stderr)
        self._late = False
        self._messages: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            with self._process.stdin as stdin:
                stdin.write(json.dumps({"checks": list(checks), "asked": asdict(asked)}))
        except OSError:  # it ended at once: its code and its last line say why
            return

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(line)
        self._messages.put(None)

    def messages(self, limit: float) -> Iterator[dict[str, Any]]:
        """Until it ends, or says nothing for `limit` seconds."""
        while True:
            try:
                line = self._messages.get(timeout=limit)
            except queue.Empty:
                self._late = True
                return
            if line is None:
                return
            yield json.loads(line)

    def stop(self) -> Ended:
        if not self._late:
            try:
                self._process.wait(timeout=5)  # it has closed its output
            except subprocess.TimeoutExpired:
                self._late = True
        _kill(self._process)
        code = self._process.wait()
        return Ended(None if self._late else code, self._stderr.lines())


class _Tail:
    """The last lines of a stream, read as they come."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip():
                self._lines.append(line.rstrip())

    def lines(self) -> list[str]:
        """What has come, once the process has ended."""
        self._thread.join(timeout=5)
        return list(self._lines)


def _start(
    command: Sequence[str], folder: Path | None, changed: Mapping[str, str], talks: bool = False
) -> subprocess.Popen[str]:
    """In a session of its own, so that what it starts ends with it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=dict(changed),
        stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
        stdout=subprocess.PIPE if talks else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends the process and all that it started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # nothing of it is left
    else:
        process.kill()
