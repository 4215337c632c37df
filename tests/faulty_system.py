"""The system calls by which this process changes files, counted, and failed where a test wants it.

What Python code changes goes through `open` and `os`, which are interposed; each write of a buffer is one boundary. The
libraries in Rust write by themselves: for them a file's opening and its content are one boundary each.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
from transformers.tokenization_utils_tokenizers import TokenizersBackend

TAKES_SPACE = {"open", "write", "mkdir", "symlink"}
KILLED = 137
PATHS = {"mkdir": 1, "unlink": 1, "remove": 1, "rmdir": 1, "rename": 2, "replace": 2, "symlink": 2, "truncate": 1}
"""Functions of `os` that change names or sizes -> how many paths they take."""


class FaultySystem:
    """Calls `decide(number, operation, path)` before each change below `root`.

    `decide` may raise (an OSError is what the call then fails with), end the process, or return "torn": a write then
    leaves half of its data and `decide` is called again, to raise, to end the process, or to return "lost": nobody is
    told.
    """

    def __init__(self, root: Path, decide: Callable[[int, str, str], str | None]) -> None:
        self.root = os.path.realpath(root)
        self.decide = decide
        self.operations: list[tuple[str, str]] = []

    def at(self, operation: str, path: Any) -> str | None:
        """A change is about to be made; whether it is to be torn."""
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(self.root + os.sep):
            return None
        self.operations.append((operation, place[len(self.root) + 1 :]))
        return self.decide(len(self.operations) - 1, operation, place)

    def write(self, path: Any, size: int, whole: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """A write of `size` bytes."""
        if self.at("write", path) == "torn":
            if size > 1:
                half()
            if self.decide(len(self.operations) - 1, "torn", os.fsdecode(path)) == "lost":
                return size
        return whole()

    @contextmanager
    def interposed(self):
        """Inside, the changes of this process are seen."""
        with pytest.MonkeyPatch.context() as patch:
            opened = self._open(io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            for name, paths in PATHS.items():
                patch.setattr(os, name, self._change(name, paths, getattr(os, name)))
            patch.setattr(os, "fsync", self._fsync(os.fsync))
            patch.setattr(safetensors.torch, "serialize_file", self._serialize)
            patch.setattr(TokenizersBackend, "backend_tokenizer", property(lambda it: _Tokenizer(self, it._tokenizer)))
            yield self

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self.at("open", file)
            raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

        return opened

    def _change(self, name: str, paths: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments, **options):
            for path in arguments[:paths][-1:]:
                if not isinstance(path, int):
                    descriptor = options.get("dir_fd")
                    place = path if descriptor is None else os.path.join(_path_of(descriptor), os.fsdecode(path))
                    self.at(name, place)
            return real(*arguments, **options)

        return change

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor):
            self.at("fsync", _path_of(descriptor))
            real(descriptor)

        return fsync

    def _serialize(self, tensors, filename, metadata=None):
        self.at("open", filename)
        data = safetensors.serialize(tensors, metadata=metadata)
        self.write(
            filename,
            len(data),
            lambda: _plain_write(filename, data),
            lambda: _plain_write(filename, data[: len(data) // 2]),
        )


class _Raw(io.FileIO):
    """A file whose every write is a boundary."""

    def __init__(self, system: FaultySystem, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._system = system

    def write(self, data) -> int:
        kept = bytes(data)
        whole, half = super().write, kept[: len(kept) // 2]
        return self._system.write(self.name, len(kept), lambda: whole(kept), lambda: whole(half))


class _Tokenizer:
    """A tokenizer of Rust whose saving is a boundary."""

    def __init__(self, system: FaultySystem, tokenizer: Any) -> None:
        self._system = system
        self._tokenizer = tokenizer

    def save(self, path: str, *arguments: Any) -> None:
        self._system.at("open", path)
        data = self._tokenizer.to_str(pretty=True).encode()
        self._system.write(
            path,
            len(data),
            lambda: self._tokenizer.save(path, *arguments),
            lambda: _plain_write(path, data[: len(data) // 2]),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def in_child(told: Path, action: Callable[[], int], seconds: float | None = None) -> int | None:
    """The exit code of `action` in a fork of this process: 99 for an exception, the negative number for a signal; None
    where it did not end in so many seconds, and was killed. What it prints goes to the file `told`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        gc.freeze()  # what is garbage of before the fork stays: a group of processes waits for its threads to end
        try:
            descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # pytest's are in memory
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if seconds is None:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _plain_write(path: Any, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


@contextmanager
def refusing(root: Path, *, but: Path | None = None, code: int = errno.ENOSPC):
    """Inside, nothing more can be written below `root`, except below `but`. Gives the refused operations."""
    refused: list[str] = []

    def decide(number: int, operation: str, path: str) -> None:
        if operation in TAKES_SPACE and (but is None or not path.startswith(os.path.realpath(but))):
            refused.append(f"{operation} {path}")
            raise OSError(code, os.strerror(code), path)

    with FaultySystem(root, decide).interposed():
        yield refused
