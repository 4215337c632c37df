"""What trackers are told: captions and settings without secrets, figures at their steps."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from glm_training.utils.trackers import TensorBoardTracker, Wandb, WandbTracker

IMAGES = torch.zeros(1, 3, 2, 2)
CAPTION = "a sign, api_key=hunter2xyz"


@pytest.fixture
def told(monkeypatch):
    """A W&B that keeps what it is given."""
    kept = SimpleNamespace(logged=[], options={})
    run = SimpleNamespace(
        id="abc", define_metric=lambda *given, **named: None, log=kept.logged.append, finish=lambda: None
    )
    wandb = SimpleNamespace(
        init=lambda **options: kept.options.update(options) or run,
        Settings=lambda **options: options,
        Image=lambda picture, caption: caption,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return kept


def wandb_of(folder, **config) -> WandbTracker:
    return Wandb("p", None, "offline").start(folder, False, config)


def test_wandb_shows_no_secret_in_captions_or_settings(tmp_path, told):
    tracker = wandb_of(tmp_path, reward={"token": "hunter2xyz", "url": "https://me:hunter2xyz@host/x"}, seed=3)
    assert "hunter2xyz" not in str(told.options["config"]) and told.options["config"]["seed"] == 3
    tracker.images(7, "samples", IMAGES, [CAPTION])
    assert told.logged == [{"step": 7, "samples": ["a sign, api_key=***"]}]


def test_tensorboard_shows_no_secret_in_captions(tmp_path):
    tracker, told = TensorBoardTracker(tmp_path, None), []
    tracker._writer = SimpleNamespace(
        add_image=lambda tag, image, step: told.append((tag, step)),
        add_text=lambda tag, text, step: told.append((tag, text, step)),
        add_scalar=lambda tag, value, step: told.append((tag, value, step)),
        flush=lambda: None,
        close=lambda: None,
    )
    tracker.images(7, "samples", IMAGES, [CAPTION])
    tracker.log(8, {"loss": 0.5})
    assert told == [("samples/0", 7), ("samples/0", "a sign, api_key=***", 7), ("loss", 0.5, 8)]
