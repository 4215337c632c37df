"""A stop signal before any line of a module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType


class Stop(BaseException):
    """What a signal raises."""


def stopped_at(module: ModuleType, line: int, work: Callable[[], object]) -> bool:
    """Whether `work` came to as many lines of `module`; a stop came before that one. For a process that ends after it:
    an error of a trace stays with the thread."""
    to_come = line

    def trace(frame, event, argument):
        nonlocal to_come
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            to_come -= 1
            if to_come == 0:
                raise Stop
        return trace

    sys.settrace(trace)
    try:
        work()
    except Stop:
        pass
    finally:
        sys.settrace(None)
    return to_come <= 0
