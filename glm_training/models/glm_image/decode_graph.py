"""Steps of the decode loop as a CUDA graph: one step is recorded, and replayed once per token.

A step of the AR half is hundreds of small kernels, and at small batches the host takes longer to name them than the GPU
to run them. The graph holds the very step that `Decoding.advance_by_device` takes; nothing of it waits for the host.
It lasts for one batch of samples: weights may move or be trained between rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from transformers import GlmImageForConditionalGeneration

from glm_training.models.glm_image.decode import Decoding

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Steps that are taken by themselves before the recording: libraries set themselves up in them, and autocast keeps its
casts of weights, which must not be made inside a graph that others outlive."""

WORTH = 32
"""Steps from which on `auto` records: the recording costs about as much as two steps from the host."""

Mode = Literal["auto"] | bool
Recorder = Callable[[Callable[[], None]], AbstractContextManager[Callable[[], None]]]
"""Records a step; gives what replays it, until the context ends."""


class GraphError(RuntimeError):
    """A graph was demanded, and there can be none."""


def obstacle(model: GlmImageForConditionalGeneration) -> str | None:
    """Why steps of this model cannot be recorded, as far as can be told beforehand."""
    parts = (model.model.language_model, model.lm_head)
    devices = {weight.device for part in parts for weight in part.parameters()}
    if any(device.type != "cuda" for device in devices):
        return "the AR half is not on a GPU"
    if len(devices) > 1:
        return "the AR half lies on several GPUs"
    if any(hasattr(module, "_hf_hook") for part in parts for module in part.modules()):
        return "accelerate's hooks move weights of the AR half at each step"
    return None


class Stepper:
    """How the steps of an AR half are taken: by replaying a graph, or one by one where there is none; told once.

    mode      "auto": a graph where it can be and is worth its recording; True: a graph, or GraphError; False: none
    recorder  what records a step, a CUDA graph unless given
    """

    def __init__(self, mode: Mode = "auto", recorder: Recorder | None = None) -> None:
        self.mode = mode
        self.recorder = recorder
        self.refusals: list[str] = []
        """Why there is no recording; after it none is tried."""

    @contextmanager
    def steps(self, decoding: Decoding) -> Iterator[Callable[[int], None]]:
        """What takes step 1, step 2, ... of `decoding`. Raises GraphError."""
        least = WORTH if self.mode == "auto" else WARM_UP + 1
        device = decoding.sampler.token.device
        reason = obstacle(decoding.model) if self.recorder is None and self.mode is not False else None
        if reason is not None and not self.refusals and (self.mode is True or device.type == "cuda"):
            self._refuse(reason)  # that a CPU has none is no news
        if self.mode is False or self.refusals or reason is not None or decoding.steps < least:
            yield decoding.advance
            return
        with ExitStack() as stack:
            yield _Graphed(decoding, self.recorder or (lambda step: recorded(step, device)), self._refuse, stack).step

    def _refuse(self, reason: str) -> None:
        if self.mode is True:
            raise GraphError(
                f"no CUDA graph of a decode step: {reason}. Set rollout.cuda_graph: auto to decode without one"
            )
        self.refusals.append(reason)
        logger.warning("AR decode goes on without a CUDA graph: %s", reason)


class _Graphed:
    """Steps of one decoding: some by themselves, then the recording and its check, then replays."""

    def __init__(self, decoding: Decoding, recorder: Recorder, refuse: Callable[[str], None], stack: ExitStack) -> None:
        self._decoding = decoding
        self._recorder = recorder
        self._refuse = refuse
        self._stack = stack
        self._replay: Callable[[], None] | None = None

    def step(self, step: int) -> None:
        if self._replay is not None:
            self._replay()
        elif step > WARM_UP:
            self._decoding.advance(step)  # there was no recording
        else:
            self._decoding.advance_by_device()
            if step == WARM_UP:
                self._record()

    def _record(self) -> None:
        try:
            replay = self._stack.enter_context(self._recorder(self._decoding.advance_by_device))
        except RuntimeError as error:  # what CUDA, torch and its allocator raise of a recording that breaks off
            self._refuse(f"recording it failed ({str(error).strip().splitlines()[0] if str(error) else repr(error)})")
            return
        # A kernel that a library started beside the recording is no part of it: the last step once more, by the graph
        sampler = self._decoding.sampler
        tokens, log_probs = sampler.drawn(WARM_UP)
        sampler.take_back(WARM_UP)
        replay()
        again, log_probs_again = sampler.drawn(WARM_UP)
        same = torch.equal(tokens, again) and torch.allclose(log_probs, log_probs_again, atol=1e-3, equal_nan=True)
        if same and int(sampler.step) == WARM_UP + 1:
            self._replay = replay
            return
        sampler.take_back(WARM_UP)
        self._decoding.advance_by_device()
        self._refuse("a replay does not give what the step gave, so part of it was not recorded")


@contextmanager
def recorded(step: Callable[[], None], device: torch.device) -> Iterator[Callable[[], None]]:
    """A CUDA graph of `step` on `device`; its memory goes back to the allocator when the context ends.

    Other threads may use the GPU meanwhile (rewards score while the next samples are drawn), so that only what this
    one does breaks a recording off.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            yield graph.replay
        finally:
            torch.cuda.current_stream().synchronize()  # replays may be under way when a rollout is abandoned
            graph.reset()
