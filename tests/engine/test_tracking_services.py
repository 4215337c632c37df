"""Which trackers a configuration asks for, and that every one that cannot start is told before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from glm_training.engine.setup import tracking_services
from glm_training.utils.trackers import SwanLab, TrackerError, Trackio, Wandb
from tests.config.building import build

ALL = {"use_wandb": True, "use_swanlab": True, "use_trackio": True}


def test_services_with_their_settings():
    assert tracking_services(build()) == []
    logging = {
        **ALL,
        "wandb_project": "w", "wandb_entity": "me", "wandb_mode": "offline",
        "swanlab_project": "s", "swanlab_workspace": "us",
        "trackio_project": "t", "trackio_space": "me/runs", "trackio_mode": "online",
    }  # fmt: skip
    assert tracking_services(build(logging=logging)) == [
        Wandb("w", "me", "offline"), SwanLab("s", "us", "online"), Trackio("t", "me/runs", "online")
    ]  # fmt: skip


def test_disabled_ones_are_left_out():
    modes = {"wandb_mode": "disabled", "swanlab_mode": "disabled", "trackio_mode": "disabled"}
    assert tracking_services(build(logging={**ALL, **modes})) == []
    assert tracking_services(build(logging={**ALL, **modes, "trackio_mode": "offline"})) == [
        Trackio("glm-image-training", None, "offline")
    ]


@pytest.mark.parametrize("package", ["wandb", "swanlab", "trackio"])
def test_each_says_which_extra_it_lacks(monkeypatch, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (service,) = tracking_services(build(logging={f"use_{package}": True}))
    with pytest.raises(TrackerError, match=rf"glm_training\[{package}\]"):
        service.check()
