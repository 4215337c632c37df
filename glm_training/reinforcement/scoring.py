"""Scoring beside drawing: while the model draws the next chunk of a step, the last one is scored."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from glm_training.reinforcement.credit import Scored
from glm_training.utils.distributed import World


class ScoringQueue:
    """Runs scorings one after another, in the order they are put: at once, or with `overlap` in a thread.

    Rewards do not depend on the weights that are being trained, so the results are the same either way. Leaving the
    block drops what has not begun.
    """

    def __init__(self, world: World, *, overlap: bool) -> None:
        def prepare() -> None:
            if world.device.type == "cuda":  # the current device belongs to the thread
                torch.cuda.set_device(world.device)

        self._thread = ThreadPoolExecutor(1, "scoring", initializer=prepare) if overlap else None
        self._waiting: list[Future[Scored]] = []

    def put(self, score: Callable[[], Scored]) -> None:
        """Adds a scoring. Without `overlap` it is done when this returns, and raises what it raises."""
        if self._thread is not None:
            self._waiting.append(self._thread.submit(score))
            return
        done: Future[Scored] = Future()
        done.set_result(score())
        self._waiting.append(done)

    def results(self) -> list[Scored]:
        """Everything put so far, in order; waits for it, and raises the first error among them."""
        return [future.result() for future in self._waiting]

    def __enter__(self) -> ScoringQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=kind is None, cancel_futures=True)
