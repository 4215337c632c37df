"""A reward that a server computes: batched requests over HTTP, retried, with answers checked before they count.

    GET  {url}/health -> any 2xx
    POST {url}/score
         {"samples": [{"prompt": "...", "image": "<PNG, base64>", "target": "...", "source": "..."}, ...]}
      -> {"scores": [0.7, null, ...], "errors": [null, "why that sample has no score", ...]}

``target`` and ``source`` are sent where the options ask for them; ``errors`` may be left out.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Annotated

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glm_training.rewards.exchange import Exchange, Response, Unanswered
from glm_training.rewards.foreign import SHOWN, shown
from glm_training.rewards.options import RemoteOptions
from glm_training.rewards.types import (
    LARGEST_SCORE,
    MetricScores,
    RewardBackendError,
    RewardBatch,
    RewardServiceError,
    to_pil,
)
from glm_training.utils.words import counted

LONGEST_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2
"""How often a stop is looked for while a server is waited for."""

_HEALTH_SECONDS = 10.0
_WORTH_RETRYING = (408, 425, 429)
"""4xx codes that say `later`, not `never`."""


class _Answer(BaseModel):
    """What a server answers: a number per sample that fp32 can hold, or null with the reason in ``errors``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    # fail_fast: one error says enough of a list of a million wrong ones
    scores: Annotated[list[float | None], Field(fail_fast=True)]
    errors: Annotated[list[str | None], Field(fail_fast=True)] | None = None


@dataclass
class _Chunk:
    """Samples of a batch that go out in one request: `rows` of it, after `tries` attempts not before `due`."""

    rows: range
    body: bytes | None = None
    tries: int = 0
    due: float = 0.0


class RemoteReward:
    """The metric ``remote/<name>``: whatever number the server gives, higher is better.

    Applies to every sample that has the images that ``send`` asks for. ``score`` may be called from any one thread.
    """

    def __init__(self, name: str, options: RemoteOptions) -> None:
        """``name``: the metric's full name, for messages."""
        self._name = name
        self._key = f"reward.options.{name.replace('/', '.', 1)}"
        self._options = options
        self._url = options.url.rstrip("/")
        self._ready = False

    @property
    def needs(self) -> str:
        """The images that samples must have."""
        return " and ".join(f"a {name} image" for name in self._options.send) or "nothing"

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """True when the sample has every image to be sent."""
        there = {"target": has_target, "source": has_source}
        return all(there[name] for name in self._options.send)

    def check(self) -> None:
        """Ask the server whether it is there, once. Raises RewardBackendError with the key to look at."""
        if self._ready:
            return
        remedy = f"Start the server, or set {self._key}.url to the address below which /health and /score lie"
        ended: SimpleQueue[Exchange] = SimpleQueue()
        exchange = self._send("GET", "health", None, ended, min(_HEALTH_SECONDS, self._options.timeout_seconds))
        try:
            try:
                response = ended.get(timeout=exchange.seconds_left).response()
            except Empty:
                raise exchange.leave() from None
        except Unanswered as cause:
            raise RewardBackendError(f"{self._name}: {self._url}/health does not answer ({cause}). {remedy}") from None
        if not response.is_success:
            raise RewardBackendError(f"{self._name}: {self._url}/health answers {self._quoted(response)}. {remedy}")
        self._ready = True

    def score(self, batch: RewardBatch) -> MetricScores:
        """The server's scores, in the order of the batch. Raises RewardServiceError when it gives none, and
        ScoringStopped, at once, where a stop was asked for."""
        size = self._options.batch_size
        chunks = [_Chunk(range(start, min(start + size, len(batch)))) for start in range(0, len(batch), size)]
        scores = MetricScores(torch.zeros(len(batch)))
        for rows, answer in self._answers(batch, chunks):
            for row, value, reason in zip(rows, answer.scores, answer.errors or [None] * len(rows), strict=True):
                if value is None:
                    said = self._shown(reason) if reason else "no score, and no reason in `errors`"
                    scores.failures[row] = f"{self._url}/score: {said}"
                else:
                    scores.values[row] = value
        return scores

    def _answers(self, batch: RewardBatch, chunks: Sequence[_Chunk]) -> list[tuple[range, _Answer]]:
        """The answers to `chunks`, at most `concurrent_requests` of which are under way at once."""
        started = time.monotonic()
        waiting, answers = list(chunks), []
        under_way: dict[Exchange, _Chunk] = {}
        ended: SimpleQueue[Exchange] = SimpleQueue()
        try:
            while waiting or under_way:
                batch.raise_if_stopped()
                self._start(batch, waiting, under_way, ended)
                for exchange, cause in self._next(waiting, under_way, ended):
                    chunk = under_way.pop(exchange)
                    try:
                        answers.append((chunk.rows, self._answer(exchange, cause, len(chunk.rows))))
                    except Unanswered as error:
                        waiting.append(self._again(chunk, str(error), started))
        finally:
            for exchange in under_way:  # nobody waits for the others
                exchange.leave()
        return answers

    def _start(
        self, batch: RewardBatch, waiting: list[_Chunk], under_way: dict[Exchange, _Chunk], ended: SimpleQueue[Exchange]
    ) -> None:
        """Sends what is due, as far as there is room."""
        for chunk in [chunk for chunk in waiting if chunk.due <= time.monotonic()]:
            if len(under_way) == self._options.concurrent_requests:
                return
            waiting.remove(chunk)
            chunk.body = chunk.body or self._body(batch.select(chunk.rows))
            under_way[self._send("POST", "score", chunk.body, ended, self._options.timeout_seconds)] = chunk

    def _next(
        self, waiting: list[_Chunk], under_way: dict[Exchange, _Chunk], ended: SimpleQueue[Exchange]
    ) -> list[tuple[Exchange, Unanswered | None]]:
        """What ended or became overdue within a moment; the latter is left alone, and comes with how far it got."""
        moments = [POLL_SECONDS, *(exchange.seconds_left for exchange in under_way)]
        if len(under_way) < self._options.concurrent_requests:
            moments += [chunk.due - time.monotonic() for chunk in waiting]
        try:
            exchange = ended.get(timeout=max(0.0, min(moments)))
        except Empty:
            return [(exchange, exchange.leave()) for exchange in under_way if exchange.seconds_left <= 0]
        return [(exchange, None)] if exchange in under_way else []  # one that was left alone has ended by now

    def _again(self, chunk: _Chunk, cause: str, started: float) -> _Chunk:
        """`chunk`, due after a pause. Raises RewardServiceError when it has been tried often enough."""
        pause = min(self._options.backoff_seconds * 2**chunk.tries, LONGEST_WAIT_SECONDS)
        chunk.tries += 1
        chunk.due = time.monotonic() + pause
        if chunk.tries <= self._options.retries:
            return chunk
        attempts = "1 attempt" if chunk.tries == 1 else f"{chunk.tries} attempts"
        raise RewardServiceError(
            f"{self._name}: {self._url}/score gave no usable answer in {attempts} over "
            f"{time.monotonic() - started:.0f} s. The last one: {cause}. Look at the server's log and start it again; "
            f"{self._key}.timeout_seconds, .retries and .backoff_seconds say how long it is waited for"
        )

    def _send(
        self, method: str, page: str, body: bytes | None, ended: SimpleQueue[Exchange], seconds: float
    ) -> Exchange:
        token = self._token()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        url = f"{self._url}/{page}"
        return Exchange(method, url, headers, body, seconds=seconds, ended=ended, secrets=self._secrets())

    def _token(self) -> str | None:
        """What `token_variable` holds; None where none is asked for."""
        variable = self._options.token_variable
        if variable is None:
            return None
        token = os.environ.get(variable, "").strip()
        where = f"the environment variable {variable}"
        if not token:
            raise RewardBackendError(f"{self._name}: {where} is not set; {self._key}.token_variable names it")
        if not (token.isascii() and token.isprintable()):
            raise RewardBackendError(f"{self._name}: {where} holds characters that a token cannot have, as a line end")
        return token

    def _secrets(self) -> tuple[str, ...]:
        token = self._token()
        return () if token is None else (token,)

    def _shown(self, text: str, limit: int = SHOWN) -> str:
        return shown(text, limit, self._secrets())

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

    def _answer(self, exchange: Exchange, overdue: Unanswered | None, count: int) -> _Answer:
        """What the server says of `count` samples. Raises Unanswered where another attempt may help,
        RewardServiceError where it cannot."""
        if overdue is not None:
            raise overdue
        response = exchange.response()
        if response.is_success:
            return self._parse(response.body, count)
        if response.status >= 500 or response.status in _WORTH_RETRYING:
            raise Unanswered(self._quoted(response))
        hint = f" (the token is read from {self._key}.token_variable)" if response.status in (401, 403) else ""
        raise RewardServiceError(
            f"{self._name}: {self._url}/score refuses the request{hint}: {self._quoted(response)}. It is not asked "
            f"again. Check {self._key} and the server; docs/rewards.md describes what is sent and what is expected"
        )

    def _parse(self, body: bytes, count: int) -> _Answer:
        try:
            answer = _Answer.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(item) for item in first["loc"][:2])
            where = f"`{place}` is {self._shown(repr(first['input']), 80)}: " if place else ""
            begins = self._shown(body.decode("utf-8", "replace"), 80)
            # from None: a traceback in the log would quote the answer unmasked
            raise Unanswered(f"an answer that is not as agreed: {where}{first['msg']}; it begins {begins!r}") from None
        for name, items in (("scores", answer.scores), ("errors", answer.errors)):
            if items is not None and len(items) != count:
                raise Unanswered(f"an answer with {len(items)} {name} for {counted(count, 'sample')}")
        for row, value in enumerate(answer.scores):
            if value is not None and abs(value) > LARGEST_SCORE:
                raise Unanswered(
                    f"an answer whose `scores.{row}` is {value:g}: fp32 holds no more than {LARGEST_SCORE:.2g}"
                )
        return answer

    def _quoted(self, response: Response) -> str:
        text = self._shown(response.body.decode("utf-8", "replace"))
        target = None if response.location is None else self._shown(response.location)
        return f"HTTP {response.status}" + (f" to {target}" if target else "") + (f": {text}" if text else "")


def encode_png(image: Image.Image) -> str:
    """A picture as PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
