"""SwanLab and trackio themselves, offline. Each needs an environment of its own beside the others' newest libraries
(trackio: pillow < 13; SwanLab: protobuf < 7), so each is tested where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.utils.distributed import World
from glm_training.utils.logging import RunLogger
from glm_training.utils.trackers import SwanLab, Trackio


def needs(package: str):
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f'needs the {package} extra: pip install "glm_training[{package}]"')


IMAGES = torch.stack([torch.full((3, 8, 6), 0.2), torch.full((3, 8, 6), 1.0)])
PIXELS = [51, 255]  # 0.2 and 1 of 255
CAPTIONS = ["a cat", "a dog, api_key=hunter2xyz"]


def train(run, service, resume_step=None, steps=(1, 2, 3)):
    """A run that logs 0.625 times each of its steps, and pictures at the last one."""
    config = {"seed": 1, "hf_token": "hunter2xyz", "model": {"name": "tiny"}}
    with RunLogger(
        run, World(), use_tensorboard=False, services=[service], resume_step=resume_step, config=config
    ) as log:
        for step in steps:
            log.log(step, {"reward/total": 0.625 * step, "kl": math.nan})
        log.images(steps[-1], "samples", IMAGES, CAPTIONS)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def shows_the_images(files) -> bool:
    found = sorted((pixels(file) for file in files), key=lambda picture: picture.mean())
    return [picture.shape for picture in found] == [(8, 6, 3)] * 2 and all(
        (picture == level).all() for picture, level in zip(found, PIXELS, strict=True)
    )


@needs("swanlab")
def test_swanlab_offline_holds_figures_and_pictures_and_a_resumed_run_goes_on(tmp_path):
    service = SwanLab("p", None, "offline")
    train(tmp_path, service)
    train(tmp_path, service, resume_step=2, steps=(3, 4))
    first, second = sorted((tmp_path / "swanlog").glob("run-*"))
    identifier = (tmp_path / "swanlab_id.txt").read_text().strip()
    for folder, steps in ((first, (1, 2, 3)), (second, (3, 4))):
        (record,) = folder.glob("run-*.swanlab")
        assert record.name == f"run-{identifier}.swanlab"  # one run of SwanLab, whose two parts `swanlab sync` sends
        content = record.read_bytes()
        assert b"reward/total" in content and b"a dog, api_key=***" in content
        assert [step for step in range(1, 6) if struct.pack("<d", 0.625 * step) in content] == list(steps)
        assert shows_the_images((folder / "media" / "image").iterdir())
        settings = (folder / "files" / "config.yaml").read_text()
        assert "tiny" in settings and "hunter2xyz" not in settings
    assert not any(b"hunter2xyz" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@needs("swanlab")
def test_swanlab_that_cannot_write_ends_no_run(tmp_path, caplog):
    (tmp_path / "swanlog").write_text("a file where its folder should be")
    train(tmp_path, SwanLab("p", None, "offline"))
    assert "SwanLab failed and is off" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Where trackio keeps its runs; it reads the variable when it is imported, once per process."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        from trackio.sqlite_storage import SQLiteStorage

        yield folder, SQLiteStorage


@needs("trackio")
def test_trackio_offline_holds_figures_and_pictures_and_a_resumed_run_goes_on(tmp_path, database):
    folder, storage = database
    service = Trackio("whole", None, "offline")
    train(tmp_path, service)
    train(tmp_path, service, resume_step=2, steps=(3, 4))
    (name,) = storage.get_runs("whole")  # both parts are one run
    assert (tmp_path / "trackio_name.txt").read_text().strip() == name
    rows = storage.get_logs("whole", name)
    figures = [(row["step"], row["reward/total"]) for row in rows if "reward/total" in row]
    assert figures == [(1, 0.625), (2, 1.25), (3, 1.875), (3, 1.875), (4, 2.5)]
    pictures = [row for row in rows if "samples/0" in row]
    assert [row["step"] for row in pictures] == [3, 4]
    for row in pictures:
        shown = [row["samples/0"], row["samples/1"]]
        assert [entry["caption"] for entry in shown] == ["a cat", "a dog, api_key=***"]
        assert shows_the_images(folder / "media" / entry["file_path"] for entry in shown)
    settings = storage.get_run_config("whole", name)
    assert settings["model"] == {"name": "tiny"} and settings["hf_token"] == "***"
    train(tmp_path, service)  # a run that starts anew is another one
    assert len(storage.get_runs("whole")) == 2


@needs("trackio")
def test_trackio_that_cannot_start_ends_no_run(tmp_path, database, caplog):
    train(tmp_path, Trackio("registry-mine", None, "offline"))  # a name that trackio keeps for itself
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "trackio failed and is off" in warnings[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
