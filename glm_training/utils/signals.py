"""Stopping on request: the first stop signal is remembered and polled, the second one aborts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it loads torch, and a command listens to signals before that
    from glm_training.utils.distributed import World

logger = logging.getLogger(__name__)


def _here(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


WARNINGS = _here("SIGHUP", "SIGUSR1", "SIGUSR2")
"""What a terminal sends that goes away, often twice, and what schedulers send ahead of the end, as `sbatch
--signal=USR1`; Windows has none of them."""

SIGNALS = (*_here("SIGINT", "SIGTERM"), *WARNINGS)
"""Ctrl-C, `scancel` or `kill`, and `WARNINGS`."""

# Ctrl-C or `scancel` reaches a worker directly and once more through torchrun, which forwards it as SIGTERM.
FORWARDING_SECONDS = 3.0


def heeded() -> tuple[signal.Signals, ...]:
    """Those of `SIGNALS` that stop a program: all but a SIGHUP that is ignored, as `nohup` has it."""
    return tuple(
        number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    )


class StopRequested(Exception):
    """A stop was asked for, and the work in flight can be dropped without a trace."""


class Aborted(SystemExit):
    """A stop was asked for a second time: the program ends where it is."""


class StopSignals:
    """A context in which the first stop signal only sets a flag, so that a step can finish and be saved.

    Poll it inside rollouts, evaluation and caching too. The second signal raises ``Aborted`` with the signal's exit
    code; under torchrun or with several processes, only if it comes more than ``FORWARDING_SECONDS`` after the first.
    ``WARNINGS`` are followed by another signal when the time is up: they abort nothing, and the one after them is the
    first. The handlers that were there before come back at the end. Outside the main thread it does nothing.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.received: int | None = None
        self.failure: Exception | None = None
        self.alone = False
        forwarded = world.world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ
        self._patience = FORWARDING_SECONDS if forwarded else 0.0
        self._first_at = 0.0
        self._previous: dict[int, object] = {}
        self._former = -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.set_wakeup_fd(-1)  # whoever waits for signals there would end the process
            self._previous = {number: signal.signal(number, self._on_signal) for number in heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._on_signal:  # else somebody had a reason to ignore it to the end
                signal.signal(number, handler)  # type: ignore[arg-type]
        if self._previous:
            signal.set_wakeup_fd(self._former)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None or (self.received in WARNINGS and number not in WARNINGS):
            self.received, self._first_at = number, time.monotonic()
        elif number not in WARNINGS and time.monotonic() - self._first_at >= self._patience:
            raise Aborted(128 + number)

    def requested(self) -> bool:
        """Whether this process was asked to stop. Sends nothing, so processes may call it at different times."""
        return self.received is not None or self.failure is not None

    def fail(self, failure: Exception) -> None:
        """Tell all processes that this one cannot go on, where they poll next; ``failure`` is then set on all of them.

        It takes the place of one ``poll`` or ``check`` of this process. The exception travels, so it must be of a kind
        that pickles. Where the others have died, ``alone`` is set: nobody is there to wait for.
        """
        self.failure = self.failure or failure
        try:
            self.poll()
        except RuntimeError as error:  # what torch.distributed raises for a lost connection
            self.alone = True
            logger.warning("the run's other processes do not answer: %s", error)

    def poll(self) -> bool:
        """Whether any process was asked to stop or failed; afterwards ``received`` or ``failure`` is set on all. Every
        process must call it."""
        from glm_training.utils.distributed import any_flag, gather_objects

        if not any_flag(self.world, self.requested()):
            return False
        if self.world.world_size > 1:
            told = gather_objects(self.world, (self.received, self.failure))
            self.received = next((number for number, _ in told if number is not None), None)
            self.failure = next((failure for _, failure in told if failure is not None), None)
        return True

    def check(self) -> None:
        """Raise StopRequested, on all processes together, when any was asked to stop. Every process must call it."""
        if self.poll():
            raise StopRequested

    @property
    def exit_code(self) -> int:
        """What the program should exit with: 128 + the signal's number, as 130 after SIGINT; 0 without any."""
        return 0 if self.received is None else 128 + self.received
