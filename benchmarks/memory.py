"""The peak of resident memory of a process, for benchmarks that add up what their arms take."""

from __future__ import annotations

import resource
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
