"""A service that gives answers that were written beforehand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable


class Answers:
    """A service that gives these (status, text), one after another, the last one for ever; `asked`: what was sent."""

    def __init__(self, *answers: tuple[int, str] | Callable[[dict], str]) -> None:
        self.answers = list(answers)
        self.asked: list[dict] = []
        self.heads: list[str] = []
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            text = head.decode().lower()
            length = int(text.split("content-length: ")[1].split()[0]) if "content-length: " in text else 0
            while len(body) < length:
                body += connection.recv(65536)
            if text.startswith("get"):
                return self._send(connection, 200, "{}")
            with self.lock:
                self.heads.append(head.decode())
                self.asked.append(json.loads(body))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            status, said = (200, answer(self.asked[-1])) if callable(answer) else answer
            self._send(connection, status, said)

    def _send(self, connection: socket.socket, status: int, text: str) -> None:
        data = text.encode()
        connection.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
