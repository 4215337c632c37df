"""One HTTP request to a server that may do anything: hang, send for ever, or send a bomb.

It runs in a daemon thread, because only that can be left alone: whoever waits for it looks at the clock and at stop
signals meanwhile, and no interpreter waits for it at its end. The answer is read up to a limit, decompressed bytes
counted.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glm_training.rewards.foreign import named

if TYPE_CHECKING:
    import httpx2

LARGEST_ANSWER = 16 * 2**20
"""Bytes of a good answer, after decompression: scores are a few, and reasons may be long."""

LARGEST_COMPLAINT = 64 * 2**10
"""Bytes that are read of any other answer: enough to quote from."""


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


class Unanswered(Exception):
    """A request brought nothing usable; another one may."""


@dataclass(frozen=True)
class Response:
    """A whole answer. `location`: where a redirect points, None without one."""

    status: int
    location: str | None
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class Exchange:
    """A request under way since its making. It puts itself into `ended` once there is a `response()`, or none will be.

    seconds: how long it may take in all. secrets: masked in what is said of it.
    """

    def __init__(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        *,
        seconds: float,
        ended: SimpleQueue[Exchange],
        secrets: tuple[str, ...] = (),
    ) -> None:
        self._request = (method, url, dict(headers), body)
        self._seconds = seconds
        self._ended = ended
        self._secrets = secrets
        self._started = time.monotonic()
        self._received = 0
        self._left = False
        self._socket: socket.socket | None = None
        self._outcome: Response | Unanswered = Unanswered("nothing")
        threading.Thread(target=self._run, name="reward-request", daemon=True).start()

    @property
    def seconds_left(self) -> float:
        """Until it is overdue."""
        return self._started + self._seconds - time.monotonic()

    def response(self) -> Response:
        """The answer. Raises Unanswered saying what came instead, or how far it came, where it has not ended."""
        if isinstance(self._outcome, Unanswered):
            raise self._outcome
        return self._outcome

    def leave(self) -> Unanswered:
        """Gives it up: its connection is cut, so that its thread ends. Returns how far it came."""
        self._left = True
        self._cut()
        came = f"only {self._received} bytes of an answer" if self._received else "nothing"
        return Unanswered(f"{came} within {self._seconds:g} s")

    def _run(self) -> None:
        try:
            self._outcome = self._send()
        except Unanswered as error:
            self._outcome = error
        # Broad: what a client makes of the bytes of a foreign server is not documented, and no answer is what it means.
        except Exception as error:
            self._outcome = Unanswered(named(error, self._secrets))
        self._ended.put(self)

    def _send(self) -> Response:
        import httpx2

        method, url, headers, body = self._request
        # Pictures go to the address given and to no other: no redirects, no proxies, no logins out of ~/.netrc.
        # The clock of whoever waits is the one that counts; this one ends a thread that was left alone.
        with (
            httpx2.Client(
                timeout=self._seconds + 1, follow_redirects=False, trust_env=False, verify=_certificates()
            ) as client,
            client.stream(
                method, url, headers=headers, content=body, extensions={"trace": self._note_socket}
            ) as response,
        ):
            return Response(response.status_code, response.headers.get("location"), self._read(response))

    def _read(self, response: httpx2.Response) -> bytes:
        limit = LARGEST_ANSWER if response.is_success else LARGEST_COMPLAINT
        pieces = []
        for piece in response.iter_bytes():
            self._received += len(piece)
            pieces.append(piece)
            if self._received > limit and response.is_success:
                raise Unanswered(f"an answer of more than {limit >> 20} MiB")
            if self._received > limit or self._left:
                break
        return b"".join(pieces)[:limit]

    def _note_socket(self, event: str, details: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = details["return_value"].get_extra_info("socket")
            if self._left:
                self._cut()

    def _cut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)
