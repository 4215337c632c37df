import importlib.util
import json
import logging
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glm_training.utils import trackers
from glm_training.utils.distributed import World
from glm_training.utils.logging import RunLogger, TrackerError
from glm_training.utils.trackers import SwanLab, Trackio, Wandb

MAIN = World()
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason='needs the wandb extra: pip install "glm_training[wandb]"'
)


def make(run_dir: Path, world: World = MAIN, **options) -> RunLogger:
    return RunLogger(run_dir, world, **({"use_tensorboard": False} | options))


def lines(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_one_json_line_per_log(tmp_path):
    with make(tmp_path / "run") as log:
        log.log(1, {"reward/total": 0.1 + 0.2, "count": 3})
        log.log(2, {"a": math.nan, "b": -math.inf, "c": 1.0})
        assert lines(tmp_path / "run" / "metrics.jsonl") == [
            {"step": 1, "reward/total": 0.1 + 0.2, "count": 3.0},
            {"step": 2, "a": None, "b": None, "c": 1.0, "nonfinite": ["a", "b"]},
        ]
        with pytest.raises(ValueError, match="'step'"):
            log.log(3, {"step": 1.0})


def test_only_the_main_process_writes(tmp_path):
    with make(tmp_path / "run", World(1, 2, 1)) as log:
        log.log(1, {"a": 1.0})
        log.images(1, "samples", torch.zeros(1, 3, 4, 4), ["x"])
        log.text("hello")
    assert not (tmp_path / "run").exists()


def test_resuming_sets_later_lines_aside_and_loses_none(tmp_path):
    with make(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"v": step})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "v"')  # torn by a kill
    with make(tmp_path, resume_step=2) as log:
        log.log(3, {"v": 30})
    assert [(line["step"], line["v"]) for line in lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 30)]
    discarded = tmp_path / "metrics.discarded.jsonl"
    assert discarded.read_text() == '{"step": 3, "v": 3.0}\n{"step": 4, "v": 4.0}\n{"step": 5, "v"\n'
    make(tmp_path, resume_step=2).close()
    assert [line["v"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert discarded.read_text().endswith('{"step": 3, "v": 30.0}\n')
    make(tmp_path, resume_step=9).close()
    assert [line["v"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_fresh_run_in_an_old_folder_does_not_mix_lines(tmp_path):
    with make(tmp_path) as log:
        log.log(1, {"v": 1})
    with make(tmp_path) as log:
        log.log(1, {"v": 2})
    assert [line["v"] for line in lines(tmp_path / "metrics.jsonl")] == [2]
    assert [line["v"] for line in lines(tmp_path / "metrics.discarded.jsonl")] == [1]


def accumulate(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def test_tensorboard_holds_tags_and_images(tmp_path):
    with make(tmp_path, use_tensorboard=True) as log:
        log.log(1, {"reward/total": 0.5, "kl": math.nan})
        log.log(2, {"reward/total": 0.75})
        log.images(2, "samples", torch.rand(2, 3, 8, 12, generator=torch.Generator()), ["a cat", "a dog"])
    events = accumulate(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in events.Scalars("reward/total")] == [(1, 0.5), (2, 0.75)]
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    image = events.Images("samples/1")[0]
    assert (image.step, image.width, image.height) == (2, 12, 8)


def test_tensorboard_follows_a_resume(tmp_path):
    folder = tmp_path / "elsewhere"
    with make(tmp_path, use_tensorboard=True, log_dir=folder) as log:
        for step in (1, 2, 3):
            log.log(step, {"v": step})
    began = int(time.time())
    while int(time.time()) == began:  # event files of one second are read in the order of a counter's text, 10 before 9
        time.sleep(0.05)
    with make(tmp_path, use_tensorboard=True, log_dir=folder, resume_step=2) as log:
        log.log(3, {"v": 30})
    assert [(event.step, event.value) for event in accumulate(folder).Scalars("v")] == [(1, 1), (2, 2), (3, 30)]


class Breaking:
    name = "Breaking"
    calls = 0

    def log(self, step, scalars):
        Breaking.calls += 1
        raise ConnectionError("the service is gone")

    images = close = log


def test_a_failing_tracker_is_switched_off_and_training_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers.TensorBoardTracker, "log", Breaking.log)
    Breaking.calls = 0
    with make(tmp_path, use_tensorboard=True) as log:
        for step in (1, 2, 3):
            log.log(step, {"v": step})
    assert Breaking.calls == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "TensorBoard failed and is off" in warnings[0].getMessage()
    assert "the service is gone" in (tmp_path / "train.log").read_text()


def test_a_tracker_that_cannot_start_is_switched_off(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with make(tmp_path, use_tensorboard=True, log_dir=tmp_path / "taken") as log:
        log.log(1, {"v": 1})
    assert "TensorBoard failed" in caplog.text and len(lines(tmp_path / "metrics.jsonl")) == 1


def test_images_are_checked_whatever_the_trackers(tmp_path):
    with make(tmp_path) as log:
        for images, captions in [(torch.zeros(3, 4, 4), ["x"]), (torch.zeros(2, 3, 4, 4), ["x"])]:
            with pytest.raises(ValueError, match="B, 3, H, W"):
                log.images(1, "samples", images, captions)


def test_train_log_takes_the_packages_records_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    with make(tmp_path) as log:
        log.text("step 1 done")
        logging.getLogger("glm_training.data.prompts_layout.scan").warning("bad file; header was hf_abcdefgh")
    logging.getLogger("glm_training.data").warning("after closing")
    text = (tmp_path / "train.log").read_text()
    assert "step 1 done" in text and "WARNING glm_training.data.prompts_layout.scan: bad file; header was ***" in text
    assert "hf_abcdefgh" not in text and "after closing" not in text


OFFLINE = {
    "wandb": Wandb("p", None, "offline"),
    "swanlab": SwanLab("p", None, "offline"),
    "trackio": Trackio("p", None, "offline"),
}


@pytest.mark.parametrize("package", OFFLINE)
@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["absent", "a folder of that name"])
def test_a_missing_package_is_an_error_on_every_process_that_names_the_extra(tmp_path, monkeypatch, package, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    for world in (MAIN, World(1, 2, 1)):
        with pytest.raises(TrackerError, match=rf'use_{package} is true.* pip install "glm_training\[{package}\]"'):
            make(tmp_path, world, services=[OFFLINE[package]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("service", "key"),
    [
        (Wandb("p", None, "online"), "WANDB_API_KEY"),
        (SwanLab("p", None, "online"), "SWANLAB_API_KEY"),
        (Trackio("p", "me/space", "online"), "HF_TOKEN"),
    ],
    ids=OFFLINE,
)
def test_keys_come_from_the_environment(tmp_path, monkeypatch, service, key):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="there"))
    monkeypatch.delenv(key, raising=False)
    with pytest.raises(TrackerError, match=f"no {key}.*_mode: offline"):
        make(tmp_path, services=[service])
    monkeypatch.setenv(key, "given")
    service.check()


def settled(journal: Path, last: bytes) -> bytes:
    """The journal once its last record is in: wandb's own process may write it shortly after the run is finished."""
    for _ in range(200):
        if last in journal.read_bytes():
            break
        time.sleep(0.1)
    return journal.read_bytes()


@needs_wandb
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with make(
        tmp_path, services=[OFFLINE["wandb"]], config={"seed": 1, "hf_token": "my-secret", "model": {"name": "tiny"}}
    ) as log:
        log.log(1, {"reward/total": 0.625, "kl": math.nan})
        log.images(1, "samples", torch.rand(2, 3, 8, 8, generator=torch.Generator()), ["a cat", "a dog"])
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (journal,) = run.glob("run-*.wandb")
    content = settled(journal, b"a dog")
    assert b"reward/total" in content and b"0.625" in content and b"tiny" in content and b"my-secret" not in content
    assert len(list((run / "files" / "media" / "images").glob("samples*.png"))) == 2


@needs_wandb
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    import wandb

    calls = []

    class Run:
        id = "abc123"

        def define_metric(self, name, step_metric):
            pass

        def log(self, values):
            calls.append(values)

        def finish(self):
            pass

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    for resume_step in (None, 1, None):
        with make(tmp_path, services=[OFFLINE["wandb"]], resume_step=resume_step) as log:
            log.log(2, {"v": 0.5})
    assert [(call["id"], call["resume"]) for call in calls[::2]] == [(None, None), ("abc123", "allow"), (None, None)]
    assert calls[1] == {"step": 2, "v": 0.5}
