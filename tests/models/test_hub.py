"""Models by hub id without a hub: the local cache, a hub that refuses, that is silent, that is not there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError, hub_options
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.tiny import build_tiny_taesd

LOADS: dict[str, Callable[[bool], Any]] = {
    "sdxl": lambda only: SDXL.load("owner/model", local_files_only=only),
    "taesd": lambda only: SDXL.load("tiny-random", taesd="owner/model", local_files_only=only),
    "glm_image": lambda only: GLMImage.load("owner/model", local_files_only=only),
}


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub at its address, and an empty cache: where it lies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests must not ask at all
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    for module in ("huggingface_hub.constants", "diffusers.configuration_utils", "diffusers.utils.hub_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """hub(status, code, body): a hub that gives every question this answer; the paths that it was asked for."""
    servers = []

    def start(status: int, code: str = "", body: bytes = b"{}") -> list[str]:
        asked: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[-1].server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def cached(cache: Path) -> Path:
    """The folder of owner/model in the cache, as a download leaves it."""
    folder = cache / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def ask(**options: Any) -> dict[str, Any]:
    return hub_options("owner/model", "model_index.json", **{"revision": None, "local_files_only": False, **options})


@pytest.mark.parametrize("name", list(LOADS))
@pytest.mark.parametrize("only", [True, False])
def test_a_model_that_is_nowhere_is_told_at_once(name: str, only: bool) -> None:
    start = time.monotonic()
    with pytest.raises(ModelLoadError) as caught:
        LOADS[name](only)
    assert time.monotonic() - start < 5
    reason, remedy = str(caught.value).splitlines()
    fault = "model.local_files_only is set" if only else "the hub cannot be reached ([Errno 111] Connection refused)"
    assert reason == f"cannot load owner/model: {fault}, and it is not in the local cache"
    assert "hf download owner/model" in remedy and "model.local_files_only: true" in remedy
    assert f"set model.{'taesd' if name == 'taesd' else 'name'} to a local folder" in remedy


@pytest.mark.parametrize("only", [True, False])
def test_the_cache_serves_without_a_hub(only: bool, no_hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = SDXL.load("tiny-random", seed=3)
    made.save_pretrained(cached(no_hub))
    loaded = LOADS["sdxl"](only)
    weights = [family.module("unet").state_dict() for family in (made, loaded)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    told = [record.message for record in caplog.records if record.name.startswith("glm_training")]
    assert len(told) == (0 if only else 1)
    assert only or "owner/model: the hub cannot be reached" in told[0] and "local cache" in told[0]


def test_a_model_of_another_family_is_named_before_its_weights_are_fetched(no_hub: Path) -> None:
    SDXL.load("tiny-random").save_pretrained(cached(no_hub))
    with pytest.raises(ModelLoadError, match="is a StableDiffusionXLPipeline, not a GlmImagePipeline: .*model.family"):
        LOADS["glm_image"](True)


@pytest.mark.parametrize("only", [True, False])
def test_the_cache_serves_taesd_without_a_hub(only: bool, no_hub: Path) -> None:
    made = build_tiny_taesd(seed=2)
    made.save_pretrained(cached(no_hub))
    start = time.monotonic()
    loaded = LOADS["taesd"](only).unet.taesd
    assert time.monotonic() - start < 15  # the loader by itself tries again for half a minute
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())


def test_a_silent_hub_is_waited_for_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelLoadError, match=r"the hub cannot be reached \(timed out\)"):
            ask()
        assert 0.4 < time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("status", "code", "revision", "told"),
    [
        (404, "RepoNotFound", None, "no such model, or it is private.*correct model.name; .*hf auth login"),
        (401, "", None, "does not give it .*401.*log in again"),
        (403, "GatedRepo", None, "those with access only.*ask for access at http://127.0.0.1:[0-9]+/owner/model"),
        (404, "RevisionNotFound", "v2", "no revision 'v2' of it.*correct model.revision"),
        (503, "", None, "does not give it .*503.*hf download owner/model"),
    ],
)
def test_a_hub_that_refuses_is_quoted(
    status: int, code: str, revision: str | None, told: str, hub: Callable[..., list[str]]
) -> None:
    asked = hub(status, code)
    with pytest.raises(ModelLoadError, match=f"(?s)cannot load owner/model: .*{told}"):
        ask(revision=revision)
    assert asked == ["/api/models/owner/model" + ("" if revision is None else f"/revision/{revision}")]


def test_a_hub_that_has_it_is_left_to_the_loader(hub: Callable[..., list[str]]) -> None:
    asked = hub(200, body=b'{"id": "owner/model"}')
    assert ask(revision="v1") == {"revision": "v1", "local_files_only": False}
    assert len(asked) == 1
    with pytest.raises(ModelLoadError, match="local_files_only is set"):
        ask(local_files_only=True)
    assert len(asked) == 1  # never asked
    hub(200, body=b"<html>log in to this network</html>")
    with pytest.raises(ModelLoadError, match="the hub cannot be reached"):
        ask()


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE forbids to ask the hub, and it is not in the local cache"):
        ask()


def test_a_name_that_is_no_hub_id_is_told() -> None:
    with pytest.raises(ModelLoadError, match="model.name owner/my model is neither a folder here nor a hub id"):
        SDXL.load("owner/my model")


def test_a_cache_that_holds_a_part_is_told(no_hub: Path) -> None:
    folder = cached(no_hub)
    SDXL.load("tiny-random").save_pretrained(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="(?s)cannot load owner/model from .*hf download owner/model"):
        LOADS["sdxl"](False)
