"""Requests to a server over HTTP, several under way at once, tried again where that may help, with answers checked
before they count."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from PIL import Image
from pydantic import BaseModel, ValidationError

from glm_training.rewards.exchange import Exchange, Response, Unanswered
from glm_training.rewards.foreign import SHOWN, shown
from glm_training.rewards.types import RewardBackendError, RewardServiceError

LONGEST_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2
"""How often a stop is looked for while a server is waited for."""

_HEALTH_SECONDS = 10.0
_WORTH_RETRYING = (408, 425, 429)
"""4xx codes that say `later`, not `never`."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Words:
    """How messages speak. name: of the server. address, patience: where its address and how long it is waited for are
    set, as the end of a sentence. token: where the variable of its token is named. expected: what to check where it
    refuses."""

    name: str
    address: str
    patience: str
    token: str
    expected: str


@dataclass(frozen=True)
class Service:
    """A server: see `options.RemoteOptions` for the numbers. health: a page that answers any 2xx, None without one."""

    url: str
    concurrent_requests: int = 2
    timeout_seconds: float = 120.0
    retries: int = 5
    backoff_seconds: float = 2.0
    token_variable: str | None = None
    health: str | None = "health"


@dataclass
class _Question(Generic[T]):
    """The request in this place of a list: after `tries` attempts not before `due`."""

    place: int
    make: Callable[[], bytes]
    body: bytes | None = None
    tries: int = 0
    due: float = 0.0


def _go_on() -> None:
    return None


class Client:
    """Asks one server. ``ask`` may be called from any one thread."""

    def __init__(self, service: Service, words: Words) -> None:
        self._service, self._words = service, words
        self._url = service.url.rstrip("/")
        self._ready = False

    def check(self) -> None:
        """Ask the server whether it is there, once. Raises RewardBackendError with what to look at."""
        page = self._service.health
        if self._ready or page is None:
            return
        name, remedy = self._words.name, f"Start the server, or {self._words.address}"
        ended: SimpleQueue[Exchange] = SimpleQueue()
        exchange = self._send("GET", page, None, ended, min(_HEALTH_SECONDS, self._service.timeout_seconds))
        try:
            try:
                response = ended.get(timeout=exchange.seconds_left).response()
            except Empty:
                raise exchange.leave() from None
        except Unanswered as cause:
            raise RewardBackendError(f"{name}: {self._url}/{page} does not answer ({cause}). {remedy}") from None
        if not response.is_success:
            raise RewardBackendError(f"{name}: {self._url}/{page} answers {self._quoted(response)}. {remedy}")
        self._ready = True

    def ask(
        self,
        page: str,
        bodies: Sequence[Callable[[], bytes]],
        read: Callable[[int, bytes], T],
        go_on: Callable[[], None] = _go_on,
    ) -> list[T]:
        """What `read` makes of the answer to each of `bodies` (place, answer -> T), in their order; it raises
        Unanswered for one that is not as agreed. Bodies are made when they are sent. `go_on` is called all the while,
        and raises to give up.

        Raises RewardServiceError when the server refuses a request, or has not answered it after all attempts.
        """
        started = time.monotonic()
        waiting = [_Question[T](place, make) for place, make in enumerate(bodies)]
        answers: dict[int, T] = {}
        under_way: dict[Exchange, _Question[T]] = {}
        ended: SimpleQueue[Exchange] = SimpleQueue()
        try:
            while waiting or under_way:
                go_on()
                self._start(page, waiting, under_way, ended)
                for exchange, cause in self._next(waiting, under_way, ended):
                    question = under_way.pop(exchange)
                    try:
                        answers[question.place] = read(question.place, self._body(page, exchange, cause))
                    except Unanswered as error:
                        waiting.append(self._again(page, question, str(error), started))
        finally:
            for exchange in under_way:  # nobody waits for the others
                exchange.leave()
        return [answers[place] for place in range(len(bodies))]

    def validated(self, kind: type[M], body: bytes) -> M:
        """An answer as a `kind`. Raises Unanswered, quoting it, where it is none."""
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(item) for item in first["loc"][:2])
            where = f"`{place}` is {self.shown(repr(first['input']), 80)}: " if place else ""
            begins = self.shown(body.decode("utf-8", "replace"), 80)
            # from None: a traceback in the log would quote the answer unmasked
            raise Unanswered(f"an answer that is not as agreed: {where}{first['msg']}; it begins {begins!r}") from None

    def shown(self, text: str, limit: int = SHOWN) -> str:
        """A text of the server's as a message may quote it: the token masked."""
        return shown(text, limit, self._secrets())

    def _start(
        self,
        page: str,
        waiting: list[_Question[T]],
        under_way: dict[Exchange, _Question[T]],
        ended: SimpleQueue[Exchange],
    ) -> None:
        """Sends what is due, as far as there is room."""
        for question in [question for question in waiting if question.due <= time.monotonic()]:
            if len(under_way) == self._service.concurrent_requests:
                return
            waiting.remove(question)
            question.body = question.body or question.make()
            under_way[self._send("POST", page, question.body, ended, self._service.timeout_seconds)] = question

    def _next(
        self, waiting: list[_Question[T]], under_way: dict[Exchange, _Question[T]], ended: SimpleQueue[Exchange]
    ) -> list[tuple[Exchange, Unanswered | None]]:
        """What ended or became overdue within a moment; the latter is left alone, and comes with how far it got."""
        moments = [POLL_SECONDS, *(exchange.seconds_left for exchange in under_way)]
        if len(under_way) < self._service.concurrent_requests:
            moments += [question.due - time.monotonic() for question in waiting]
        try:
            exchange = ended.get(timeout=max(0.0, min(moments)))
        except Empty:
            return [(exchange, exchange.leave()) for exchange in under_way if exchange.seconds_left <= 0]
        return [(exchange, None)] if exchange in under_way else []  # one that was left alone has ended by now

    def _again(self, page: str, question: _Question[T], cause: str, started: float) -> _Question[T]:
        """`question`, due after a pause. Raises RewardServiceError when it has been tried often enough."""
        pause = min(self._service.backoff_seconds * 2**question.tries, LONGEST_WAIT_SECONDS)
        question.tries += 1
        question.due = time.monotonic() + pause
        if question.tries <= self._service.retries:
            return question
        attempts = "1 attempt" if question.tries == 1 else f"{question.tries} attempts"
        raise RewardServiceError(
            f"{self._words.name}: {self._url}/{page} gave no usable answer in {attempts} over "
            f"{time.monotonic() - started:.0f} s. The last one: {cause}. Look at the server's log and start it again; "
            f"{self._words.patience}"
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
        variable = self._service.token_variable
        if variable is None:
            return None
        token = os.environ.get(variable, "").strip()
        where = f"the environment variable {variable}"
        if not token:
            raise RewardBackendError(f"{self._words.name}: {where} is not set; {self._words.token} names it")
        if not (token.isascii() and token.isprintable()):
            raise RewardBackendError(
                f"{self._words.name}: {where} holds characters that a token cannot have, as a line end"
            )
        return token

    def _secrets(self) -> tuple[str, ...]:
        token = self._token()
        return () if token is None else (token,)

    def _body(self, page: str, exchange: Exchange, overdue: Unanswered | None) -> bytes:
        """A good answer's. Raises Unanswered where another attempt may help, RewardServiceError where it cannot."""
        if overdue is not None:
            raise overdue
        response = exchange.response()
        if response.is_success:
            return response.body
        if response.status >= 500 or response.status in _WORTH_RETRYING:
            raise Unanswered(self._quoted(response))
        hint = f" (the token is read from {self._words.token})" if response.status in (401, 403) else ""
        raise RewardServiceError(
            f"{self._words.name}: {self._url}/{page} refuses the request{hint}: {self._quoted(response)}. It is not "
            f"asked again. {self._words.expected}"
        )

    def _quoted(self, response: Response) -> str:
        text = self.shown(response.body.decode("utf-8", "replace"))
        target = None if response.location is None else self.shown(response.location)
        return f"HTTP {response.status}" + (f" to {target}" if target else "") + (f": {text}" if text else "")


def encode_png(image: Image.Image) -> str:
    """A picture as PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
