"""Scoring beside drawing: while the model draws the next chunk of a step, the last one is scored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue

import torch

from glm_training.reinforcement.credit import Scored
from glm_training.rewards import ScoringStopped
from glm_training.utils.distributed import World

POLL_SECONDS = 0.2
FAREWELL_SECONDS = 2.0
"""How long a scoring that is given up may take to notice it: a reward of the user's own need not look."""


class ScoringQueue:
    """Runs scorings one after another, in the order they are put: at once, or with `overlap` in a thread.

    Rewards do not depend on the weights that are being trained, so the results are the same either way. Leaving the
    block by an error drops what has not begun. The thread is a daemon: a reward that hangs keeps no process alive.
    """

    def __init__(self, world: World, stopped: Callable[[], bool], *, overlap: bool) -> None:
        """`stopped` says whether a stop was asked for."""
        self._world = world
        self._stopped = stopped
        self._waiting: list[Future[Scored]] = []
        self._jobs: SimpleQueue[tuple[Future[Scored], Callable[[], Scored]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True) if overlap else None
        if self._thread is not None:
            self._thread.start()

    def put(self, score: Callable[[], Scored]) -> None:
        """Adds a scoring. Without `overlap` it is done when this returns, and raises what it raises."""
        future: Future[Scored] = Future()
        self._waiting.append(future)
        if self._thread is not None:
            self._jobs.put((future, score))
        else:
            future.set_result(score())

    def results(self) -> list[Scored]:
        """Everything put so far, in order; waits for it, and raises the first error among them. Raises ScoringStopped
        where a stop is asked for meanwhile."""
        for future in self._waiting:
            while not wait([future], timeout=POLL_SECONDS).done:
                if self._stopped():
                    raise ScoringStopped
        return [future.result() for future in self._waiting]

    def _work(self) -> None:
        if self._world.device.type == "cuda":  # the current device belongs to the thread
            torch.cuda.set_device(self._world.device)
        while (job := self._jobs.get()) is not None:
            future, score = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(score())
                except BaseException as error:  # it is raised where the result is asked for
                    future.set_exception(error)

    def __enter__(self) -> ScoringQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is not None:
            for future in self._waiting:
                future.cancel()
        self._jobs.put(None)
        self._thread.join(None if kind is None else FAREWELL_SECONDS)
