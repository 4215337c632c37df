"""A server of this machine that stands in for the hosts of files: a Hugging Face hub, and files by host and path."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of files that a hub keeps apart, under their SHA-256."""


@dataclass
class FileServer:
    """Serves a folder: of `hub/OWNER/NAME` as a hub does, of `HOST/PATH` as a mirror.

    breaks_after: bytes after which the next answer with a body of more breaks off. damages: the next such body has its
    first byte changed. ranges: whether parts are given. tells_sizes: whether HEAD is answered. asked: method, path and
    asked-for range of each request.
    """

    root: Path
    address: str = ""
    breaks_after: int | None = None
    damages: bool = False
    ranges: bool = True
    tells_sizes: bool = True
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def bodies(self, ending: str) -> list[str | None]:
        """The ranges that were asked for of files with such an ending."""
        return [given for method, path, given in self.asked if method == "GET" and path.endswith(ending)]


@contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    """A server of `root` while the block runs."""
    server = FileServer(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            if not server.tells_sizes:
                self.send_response(405)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            server.asked.append((self.command, path, self.headers.get("Range")))
            if path.startswith("/api/models/"):
                self.listing(path.removeprefix("/api/models/").partition("/revision/")[0])
            elif "/resolve/" in path:
                repository, _, rest = path.lstrip("/").partition("/resolve/")
                self.file(root / "hub" / repository / rest.partition("/")[2], body=body, hub=True)
            else:
                self.file(root / path.lstrip("/").replace("%2B", "+"), body=body, hub=False)

        def listing(self, repository: str) -> None:
            folder = root / "hub" / repository
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            siblings = [{"rfilename": path.relative_to(folder).as_posix(), **described(path)} for path in files]
            text = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200 if files else 404)
            if not files:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def file(self, path: Path, *, body: bool, hub: bool) -> None:
            if not path.is_file():
                self.send_response(404)
                if hub:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            asked = self.headers.get("Range") if server.ranges else None
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            if asked and start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if hub:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{checksum(path)}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                self.send_body(data[start:], path)

        def send_body(self, data: bytes, path: Path) -> None:
            large = path.suffix in LARGE
            if server.damages and large:
                data, server.damages = bytes([data[0] ^ 1]) + data[1:], False
            if server.breaks_after is not None and large and len(data) > server.breaks_after:
                data, server.breaks_after = data[: server.breaks_after], None
                self.close_connection = True
            with suppress(ConnectionError):  # of a client that has seen enough
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        server.address = f"http://127.0.0.1:{host.server_port}"
        thread = threading.Thread(target=host.serve_forever, daemon=True)
        thread.start()
        yield server
        host.shutdown()
        thread.join()


def checksum(path: Path) -> str:
    """As a hub names a file: by its SHA-256, or for a small one as git does."""
    data = path.read_bytes()
    if path.suffix in LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def described(path: Path) -> dict[str, object]:
    """A file as a hub lists it."""
    size = path.stat().st_size
    if path.suffix not in LARGE:
        return {"size": size, "blobId": checksum(path)}
    lfs = {"sha256": checksum(path), "size": size, "pointerSize": 134}
    return {"size": size, "blobId": "f" * 40, "lfs": lfs}
