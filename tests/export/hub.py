"""A server of this machine that takes uploads as the Hugging Face hub does, from huggingface_hub's own client."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Hub:
    """made: bodies of the requests that make a repository. files: what the commit holds, by name. tokens: of all
    requests. refuses: the status of each answer to a commit, None to take it."""

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    refuses: int | None = None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def _answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        self.hub.asked.append((self.command, self.path))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        self._body()
        self._answer({"id": "someone/there", "sha": "0" * 40, "siblings": [], "private": True})

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rsplit("/", 1)[-1]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            self.hub.made.append(asked)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self._answer({"url": f"{self.hub.address}/{name}", "name": name, "id": "1"})
        elif self.path.endswith("/validate-yaml"):
            asked = json.loads(body)
            front = yaml.safe_load(asked["content"].removeprefix("---\n").partition("\n---\n")[0])
            known = asked["repoType"] == "model" and isinstance(front, dict)
            self._answer({"errors": [] if known else [{"message": "no metadata"}], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {**each, "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular", "oid": None}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": [{**each, "shouldIgnore": False} for each in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer({}, 404)

    def _commit(self, body: bytes) -> None:
        if self.hub.refuses is not None:
            self._answer({"error": "no room"}, self.hub.refuses)
            return
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]
        self._answer(
            {"commitUrl": f"{self.hub.address}/someone/there/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        )

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that takes uploads for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
