"""The peak of resident memory of a process, for benchmarks that add up what their arms take."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")
"""Linux: writing 5 sets the peak of resident memory to its present value."""


def reset_peak() -> None:
    """From here on `peak_resident` counts anew, where the system can."""
    if _RESET.exists():
        _RESET.write_text("5")


def peak_resident() -> int:
    """Bytes. On Linux of this program alone: `ru_maxrss` remembers the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class PrivatePeak:
    """From here on follows, every 10 ms, what a process has to itself of resident memory, on Linux.

    Pages of files that are mapped are not in it: processes share them, and the system drops them where it needs room.
    """

    def __init__(self) -> None:
        self._before = self._largest = private_resident()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._follow, daemon=True)
        self._watch.start()

    def _follow(self) -> None:
        while not self._over.wait(0.01):
            self._largest = max(self._largest, private_resident())

    def beyond(self) -> int:
        """Ends; how far its largest size lay over that at the beginning, in bytes."""
        self._over.set()
        self._watch.join()
        return self._largest - self._before


def private_resident() -> int:
    """Bytes that this process has in memory and in no file, by Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
