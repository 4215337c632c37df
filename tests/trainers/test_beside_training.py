"""A disk that takes nothing but checkpoints ends no run, of whatever trainer; once it takes more, figures go on."""

from __future__ import annotations

import errno
import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from glm_training.checkpoint.resume import resolve_resume
from glm_training.engine.figures import is_timed
from glm_training.trainers.base_trainer import BaseTrainer
from tests import dmdr_runs, preference_runs, runs
from tests.faulty_system import refusing

SHOWN = ["logging.log_images=true", "logging.use_tensorboard=true"]
REWARD = [
    *SHOWN,
    "model.component=dit",
    "training.batch_size=1",
    "reward.grpo.num_samples=2",
    "evaluation.enabled=true",
]
ADAPTERS = ["lora.enabled=true", "lora.rank=2", "checkpoint.save_lora=true", "checkpoint.save_lora_only=true"]


def trainer_of(kind: str, folder: Path, *overrides: str) -> BaseTrainer:
    """A run of three steps with pictures, evaluations and trackers."""
    steps = ["training.max_steps=3", "logging.eval_interval=1", *overrides]
    if kind == "reward":
        return runs.trainer_of(folder, *REWARD, *ADAPTERS, *steps)
    if kind == "dpo":
        held_out = f"evaluation.eval_pairs={preference_runs.write_pairs(folder / 'pairs')}"
        return preference_runs.trainer_of(folder, "sdxl", *SHOWN, *ADAPTERS, held_out, *steps)
    return dmdr_runs.trainer_of(folder, *SHOWN, *ADAPTERS, "dmdr.update_ratio=1", *steps)


def refusing_from(trainer: BaseTrainer, monkeypatch, steps: range, code: int) -> list[str]:
    """Lets nothing but checkpoints be written from the end of step `steps.start` to the beginning of step
    `steps.stop`, the first evaluation included where that is step 0; what was refused."""
    refused: list[str] = []
    stack = ExitStack()
    step, prepare = trainer.training_step, trainer.prepare
    checkpoints = trainer.config.checkpoint_dir()

    def begin() -> None:
        refused.extend([""])
        seen = stack.enter_context(refusing(trainer.config.output_dir, but=checkpoints, code=code))
        stack.callback(lambda: refused.extend(seen))

    def prepared() -> None:
        prepare()
        if steps.start == 0:
            begin()

    def stepping() -> dict[str, float]:
        if trainer.step + 1 == steps.stop:
            stack.close()
        return step()

    monkeypatch.setattr(trainer, "prepare", prepared)
    monkeypatch.setattr(trainer, "training_step", stepping)
    monkeypatch.setattr(trainer, "close_disk", stack.close, raising=False)
    return refused


def figures(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_timed(name)} for line in lines]


@pytest.mark.parametrize("kind", ["reward", "dpo", "dmdr"])
def test_what_cannot_be_written_beside_checkpoints_ends_no_run(tmp_path, monkeypatch, caplog, capfd, kind):
    trainer = trainer_of(kind, tmp_path)
    refused = refusing_from(trainer, monkeypatch, range(0, 3), errno.ENOSPC)
    assert trainer.train().step == 3
    assert resolve_resume(tmp_path / "run" / "checkpoints", "latest").step == 3
    places = " ".join(refused)
    assert (
        "metrics.jsonl" in places and "samples/step-" in places and "tfevents" in places and "train.log" not in places
    )
    expected = [
        "writing metrics.jsonl failed",
        "TensorBoard failed and is off",
        "writing the pictures of samples failed",
    ]
    expected += ["writing evaluations.jsonl failed"] if kind == "reward" else []
    expected += ["writing loss_gui_log.jsonl failed", "writing loss_gen_log.jsonl failed"] if kind == "dmdr" else []
    for message in expected:
        assert caplog.text.count(message) == 1, message
    assert "Traceback" not in capfd.readouterr().err
    # the disk took the lines of all steps once it took anything again, in the last step
    own = figures(tmp_path / "run")
    whole = trainer_of(kind, tmp_path, f"output_dir={tmp_path}/whole")
    whole.train()
    assert own == figures(tmp_path / "whole") and len(own) >= 3
    if kind == "dmdr":
        for name in ("gui", "gen"):
            left, right = (tmp_path / run / "loss_logs" / f"loss_{name}_log.jsonl" for run in ("run", "whole"))
            assert left.read_bytes() == right.read_bytes()


def test_lines_that_are_lost_are_counted_and_the_adapters_copy_is_told(tmp_path, monkeypatch, caplog):
    trainer = trainer_of("reward", tmp_path)
    refused = refusing_from(trainer, monkeypatch, range(0, 99), errno.EIO)
    with ExitStack() as stack:
        stack.callback(lambda: trainer.close_disk())  # type: ignore[attr-defined]
        result = trainer.train()
    assert result.step == 3 and result.before and result.after
    lines = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert lines == 0 and "7 lines of metrics.jsonl could not be written and are lost" in caplog.text
    assert "copying adapters to checkpoint.lora_dir failed and they are in" in caplog.text
    assert "writing the picture of before and after failed" in caplog.text
    assert any("before_after.png" in place or "samples" in place for place in refused)
    assert not list((tmp_path / "run").rglob(".partial-*"))
