"""A reward that a server computes: batched requests over HTTP, retried, with answers checked before they count.

    GET  {url}/health -> any 2xx
    POST {url}/score
         {"samples": [{"prompt": "...", "image": "<PNG, base64>", "target": "...", "source": "..."}, ...]}
      -> {"scores": [0.7, null, ...], "errors": [null, "why that sample has no score", ...]}

``target`` and ``source`` are sent where the options ask for them; ``errors`` may be left out.
"""

from __future__ import annotations

import json
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from glm_training.rewards.client import Client, Service, Words, encode_png
from glm_training.rewards.exchange import Unanswered
from glm_training.rewards.options import RemoteOptions
from glm_training.rewards.types import LARGEST_SCORE, MetricScores, RewardBatch, to_pil
from glm_training.utils.hub_files import Wanted
from glm_training.utils.words import counted


class _Answer(BaseModel):
    """What a server answers: a number per sample that fp32 can hold, or null with the reason in ``errors``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    # fail_fast: one error says enough of a list of a million wrong ones
    scores: Annotated[list[float | None], Field(fail_fast=True)]
    errors: Annotated[list[str | None], Field(fail_fast=True)] | None = None


class RemoteReward:
    """The metric ``remote/<name>``: whatever number the server gives, higher is better.

    Applies to every sample that has the images that ``send`` asks for. ``score`` may be called from any one thread.
    """

    def __init__(self, name: str, options: RemoteOptions) -> None:
        """``name``: the metric's full name, for messages."""
        key = f"reward.options.{name.replace('/', '.', 1)}"
        self._options = options
        self._url = options.url.rstrip("/")
        service = Service(
            options.url,
            options.concurrent_requests,
            options.timeout_seconds,
            options.retries,
            options.backoff_seconds,
            options.token_variable,
        )
        words = Words(
            name=name,
            address=f"set {key}.url to the address below which /health and /score lie",
            patience=f"{key}.timeout_seconds, .retries and .backoff_seconds say how long it is waited for",
            token=f"{key}.token_variable",
            expected=f"Check {key} and the server; docs/rewards.md describes what is sent and what is expected",
        )
        self._client = Client(service, words)

    @property
    def needs(self) -> str:
        """The images that samples must have."""
        return " and ".join(f"a {name} image" for name in self._options.send) or "nothing"

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """True when the sample has every image to be sent."""
        there = {"target": has_target, "source": has_source}
        return all(there[name] for name in self._options.send)

    def wanted(self) -> list[Wanted]:
        """Nothing: the server has it."""
        return []

    def check(self) -> None:
        """Ask the server whether it is there, once. Raises RewardBackendError with the key to look at."""
        self._client.check()

    def score(self, batch: RewardBatch) -> MetricScores:
        """The server's scores, in the order of the batch. Raises RewardServiceError when it gives none, and
        ScoringStopped, at once, where a stop was asked for."""
        size = self._options.batch_size
        chunks = [range(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
        answers = self._client.ask(
            "score",
            [lambda rows=rows: self._body(batch.select(rows)) for rows in chunks],  # type: ignore[misc]
            lambda place, body: self._parse(body, len(chunks[place])),
            batch.raise_if_stopped,
        )
        scores = MetricScores(torch.zeros(len(batch)))
        for rows, answer in zip(chunks, answers, strict=True):
            for row, value, reason in zip(rows, answer.scores, answer.errors or [None] * len(rows), strict=True):
                if value is None:
                    said = self._client.shown(reason) if reason else "no score, and no reason in `errors`"
                    scores.failures[row] = f"{self._url}/score: {said}"
                else:
                    scores.values[row] = value
        return scores

    def _body(self, batch: RewardBatch) -> bytes:
        columns = {"image": batch.images, "target": batch.targets, "source": batch.sources}
        samples = [{"prompt": prompt} for prompt in batch.prompts]
        for name in ("image", *self._options.send):
            images = columns[name]
            assert images is not None  # applies() holds for every sample of the batch
            for sample, image in zip(samples, to_pil(images), strict=True):
                batch.raise_if_stopped()
                sample[name] = encode_png(image)
        return json.dumps({"samples": samples}).encode()

    def _parse(self, body: bytes, count: int) -> _Answer:
        answer = self._client.validated(_Answer, body)
        for name, items in (("scores", answer.scores), ("errors", answer.errors)):
            if items is not None and len(items) != count:
                raise Unanswered(f"an answer with {len(items)} {name} for {counted(count, 'sample')}")
        for row, value in enumerate(answer.scores):
            if value is not None and abs(value) > LARGEST_SCORE:
                raise Unanswered(
                    f"an answer whose `scores.{row}` is {value:g}: fp32 holds no more than {LARGEST_SCORE:.2g}"
                )
        return answer
