"""A reward service that fails on request, for tests: it scores a picture by its mean brightness."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

OUTRIGHT = {"500": (500, "out of memory"), "429": (429, "busy"), "400": (400, "bad sample"), "401": (401, "who?")}


class FaultyService:
    """Serves while its `with` block runs.

    faults: what goes wrong in the next requests, in order: a key of OUTRIGHT, `slow` (1 s), `hang up`, `malformed`,
    `not an object`, `missing`, `text`, `nan`, `too few`, `null`, `redirect` or `fine`. always: the same for the
    requests after those. delays: seconds before the next answers.
    """

    def __init__(self, port: int = 0) -> None:
        self.faults: list[str] = []
        self.always = "fine"
        self.delays: list[float] = []
        self.requests: list[dict] = []
        self.tokens: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"service": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> FaultyService:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No connection is taken any more."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def begin(self, request: dict, token: str) -> tuple[str, float]:
        """Notes a request; its fault and its delay."""
        with self.lock:
            self.requests.append(request)
            self.tokens.append(token)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            fault = self.faults.pop(0) if self.faults else self.always
            return fault, self.delays.pop(0) if self.delays else 0.0

    def end(self) -> None:
        """The request is answered."""
        with self.lock:
            self.at_once -= 1


def brightness(sample: dict) -> float:
    """Mean of the picture's pixels, in [0, 1]."""
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(sample["image"]))), dtype=np.float64).mean() / 255)


def body_of(fault: str, scores: list[float]) -> str:
    """The answer with its fault in it."""
    if fault == "null":
        return json.dumps(
            {"scores": [None, *scores[1:]], "errors": ["blurred beyond reading", *[None] * len(scores[1:])]}
        )
    if fault == "nan":
        return json.dumps({"scores": [float("nan"), *scores[1:]]})
    if fault == "text":
        return json.dumps({"scores": ["0.5", *scores[1:]]})
    if fault == "too few":
        return json.dumps({"scores": scores[:-1]})
    return {"malformed": '{"scores": [', "not an object": "[1]", "missing": "{}"}.get(
        fault, json.dumps({"scores": scores})
    )


class _Handler(BaseHTTPRequestHandler):
    service: FaultyService
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        self._answer(*((200, "{}") if self.path == "/health" else (404, "not here")))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault, delay = self.service.begin(request, self.headers.get("Authorization", ""))
        time.sleep(1.0 if fault == "slow" else delay)
        self.service.end()
        if fault == "hang up":
            self.close_connection = True
        elif fault == "redirect":
            self._answer(302, "", {"Location": "http://elsewhere/"})
        elif fault in OUTRIGHT:
            self._answer(*OUTRIGHT[fault])
        else:
            self._answer(200, body_of(fault, [brightness(sample) for sample in request["samples"]]))

    def _answer(self, code: int, text: str, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(text.encode())), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            self.close_connection = True  # the client has given up


class RawService:
    """Serves while its `with` block runs: `answer(service, connection)` writes what it likes after each request, in a
    thread of its own; /health is fine where `healthy`. sent: bytes that the clients took of all that `send` wrote."""

    def __init__(self, answer: Callable[[RawService, socket.socket], None], *, healthy: bool = True) -> None:
        self.answer = answer
        self.healthy = healthy
        self.sent = 0
        self.asked = threading.Event()
        self.over = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> RawService:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.listener.close()

    def send(self, connection: socket.socket, data: bytes) -> None:
        """Writes all of `data`, or raises OSError where the client has left."""
        connection.sendall(data)
        self.sent += len(data)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                head, _, body = head.partition(b"\r\n\r\n")
                if self.healthy and b"/health" in head:
                    return self.send(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                missing = int(length[1]) - len(body) if length else 0
                while missing > 0:
                    missing -= len(connection.recv(65536))
                self.asked.set()
                self.answer(self, connection)
            except OSError:
                return  # the client has given up
