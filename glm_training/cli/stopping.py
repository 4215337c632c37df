"""A command that is stopped while it loads or works says so in one line, and exits as signals ask."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Collection
from types import FrameType

from glm_training.cli.messages import report_error
from glm_training.utils.folder_lock import release_all
from glm_training.utils.signals import heeded

GRACE_SECONDS = 5.0
"""How long what is under way may take to unwind; a library may wait for a network, or for its own threads."""


class Interrupted(KeyboardInterrupt):
    """Any of the stop signals, as what libraries expect of Ctrl-C."""


def stoppable(command: Callable[[], int]) -> int:
    """The exit code of `command`, or 128 + the number of the first stop signal that it did not take itself.

    Where the interpreter is inside a library and cannot act on the signal, a thread ends the process after
    `GRACE_SECONDS`.
    """
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:  # asked for again
            release_all()
            os._exit(128 + received[0])
        received.append(number)
        raise Interrupted

    previous = {number: signal.signal(number, on_signal) for number in heeded()}
    heard, tells = socket.socketpair()
    tells.setblocking(False)
    former = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    ending = threading.Lock()  # whoever has it says why
    threading.Thread(target=_end_if_stuck, args=(heard, set(previous), ending), daemon=True).start()
    code = 0
    try:
        code = command()
    except BaseException:  # after a stop, whatever it was that the stop came out as
        if not received:
            raise
    finally:
        signal.set_wakeup_fd(former)
        if not received:
            tells.close()
        for number, handler in previous.items():
            if signal.getsignal(number) is on_signal:  # else the command had a reason to ignore it to the end
                signal.signal(number, handler if not received else signal.SIG_IGN)
    if not received:
        return code
    if not ending.acquire(blocking=False):
        threading.Event().wait()  # the thread ends the process
    release_all()  # a signal may have come as one was being given back
    report_error(_line(received[0]))
    return 128 + received[0]


def _end_if_stuck(heard: socket.socket, numbers: Collection[int], ending: threading.Lock) -> None:
    """Waits for one of the stop signals, and then for the process to end."""
    with heard:
        while (told := heard.recv(1)) and told[0] not in numbers:
            pass
    if told:
        threading.Event().wait(GRACE_SECONDS)
        if ending.acquire(blocking=False):
            release_all()
            report_error(_line(told[0]))
        else:  # it is about to end by itself, unless a thread of a library does not let it
            threading.Event().wait(GRACE_SECONDS)
        os._exit(128 + told[0])


def _line(number: int) -> str:
    return f"stopped by {signal.Signals(number).name} before it was done"
