"""What SwanLab and trackio are told, by stand-ins that keep it (`test_trackers_installed.py` asks the packages)."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from glm_training.utils.trackers import SwanLab, Trackio

IMAGES = torch.zeros(2, 3, 2, 2)
CAPTIONS = ["a sign, api_key=hunter2xyz", "a dog"]
CONFIG = {"reward": {"token": "hunter2xyz", "url": "https://me:hunter2xyz@host/x"}, "seed": 3}


class Hosted:
    """Both packages' interface as far as it is used; keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.started: list[dict] = []
        self.finished = 0
        self.Settings = type("Settings", (dict,), {"Terminal": dict, "Probe": dict})

    def init(self, **options):
        self.started.append(options)
        # as SwanLab does
        signal.signal(signal.SIGINT, lambda *given: None)
        sys.excepthook = lambda *given: None
        return SimpleNamespace(
            id=options.get("id") or f"id{len(self.started)}",
            name=options["name"],
            log=lambda values, step: self.logged.append((step, values)),
            finish=self.finish,
        )

    def finish(self):
        self.finished += 1
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.excepthook = lambda *given: None

    def Image(self, picture, caption):
        return (picture.size, caption)


@pytest.fixture(params=["swanlab", "trackio"])
def hosted(request, monkeypatch):
    package = Hosted()
    monkeypatch.setitem(sys.modules, request.param, package)
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    yield request.param, package
    signal.signal(signal.SIGINT, handler)
    sys.excepthook = hook


def service(kind: str, mode: str = "offline"):
    return SwanLab("p", None, mode) if kind == "swanlab" else Trackio("p", "me/space", mode)


def test_figures_lie_at_their_steps_and_no_secret_is_shown(tmp_path, hosted):
    kind, package = hosted
    tracker = service(kind).start(tmp_path, False, CONFIG)
    (options,) = package.started
    assert "hunter2xyz" not in str(options) and options["config"]["seed"] == 3 and options["project"] == "p"
    tracker.log(7, {"loss": 0.5})
    tracker.images(8, "samples", IMAGES, CAPTIONS)
    tracker.close()
    first, second = ((2, 2), "a sign, api_key=***"), ((2, 2), "a dog")
    pictures = {"samples": [first, second]} if kind == "swanlab" else {"samples/0": first, "samples/1": second}
    assert package.logged == [(7, {"loss": 0.5}), (8, pictures)] and package.finished == 1


def test_a_resumed_run_goes_on_in_its_own_run_and_a_new_one_does_not(tmp_path, hosted):
    kind, package = hosted
    for resume in (False, True, False):
        service(kind).start(tmp_path, resume, {}).close()
    told = [options.get("id") if kind == "swanlab" else options["name"] for options in package.started]
    if kind == "swanlab":
        assert told == [None, "id1", None] and [o["resume"] for o in package.started] == ["never", "allow", "never"]
    else:
        assert told[0] == told[1] != told[2] and all(name.startswith(f"{tmp_path.name}-") for name in told)
        assert {options["resume"] for options in package.started} == {"allow"}


@pytest.mark.parametrize("hosted", ["swanlab"], indirect=True)
def test_swanlab_leaves_signals_and_tracebacks_to_the_run(tmp_path, hosted):
    kind, _ = hosted
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    tracker = service(kind).start(tmp_path, False, {})
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == (handler, hook)

    def later(*given):
        """A handler that the run sets after the tracker began."""

    signal.signal(signal.SIGINT, later)
    tracker.close()
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == (later, hook)


@pytest.mark.parametrize("hosted", ["swanlab"], indirect=True)
@pytest.mark.parametrize(("words", "shown"), [(["train.py"], True), (["train.py", "hf_token=hunter2xyz"], False)])
def test_swanlab_is_told_neither_output_nor_a_command_with_a_secret(tmp_path, monkeypatch, hosted, words, shown):
    kind, package = hosted
    monkeypatch.setattr(sys, "argv", words)
    service(kind).start(tmp_path, False, {}).close()
    settings = package.started[0]["settings"]
    assert settings["terminal"] == {"proxy_type": "none"} and not settings["interactive"]
    assert settings["probe"] == {"runtime": shown, "git": False}


@pytest.mark.parametrize("hosted", ["trackio"], indirect=True)
@pytest.mark.parametrize(("mode", "space"), [("offline", None), ("online", "me/space")])
def test_trackio_reaches_its_space_only_when_online(tmp_path, hosted, mode, space):
    kind, package = hosted
    service(kind, mode).start(tmp_path, False, {}).close()
    assert package.started[0]["space_id"] == space
