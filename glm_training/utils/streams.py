"""Standard output and error that outlive their reader: `| head` ends, a terminal is closed, a disk behind `>` is full.

A run of days must not die of a line that nobody reads, whoever prints it: the console, a library, a reward of the
user's own.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

from glm_training.utils.failures import tell_once

GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN, errno.ESTALE}
"""Whatever was there to read does not come back."""


class SurvivingStream:
    """A text stream whose writes and flushes never raise; text that cannot be written is dropped, and told once.

    Where the reader is gone for good its descriptor leads to the null device from then on: to try again at every line,
    and once more when Python exits, would only fail again.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        with suppress(ValueError):  # closed, and flushed by that: handlers of libraries do it again at exit
            try:
                self._stream.flush()
            except OSError as error:
                self._lost(error)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def _lost(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno in GONE:
            with suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
        tell_once(f"writing to {getattr(self._stream, 'name', 'a stream')}", error, "the run goes on without it")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def surviving(stream: TextIO) -> TextIO:
    """`stream`, whose writes no longer raise."""
    return cast(TextIO, stream if isinstance(stream, SurvivingStream) else SurvivingStream(stream))


def guard_standard_streams() -> None:
    """From here on nobody in this process meets an error of standard output or standard error.

    A descriptor that was closed by whoever started the process (`>&-`) is given to the null device, or the next file
    that is opened would take its number and receive what is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (for the whole process)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a reward may print what the terminal cannot show
        setattr(sys, name, surviving(stream))
