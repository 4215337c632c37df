"""A run that resumes logs, line for line, what one logs that nobody interrupted, and its files are the same bytes.

Each resumes after step 2 of 5 from a checkpoint, with lines of every third step, so within an interval of the log.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_training.engine.figures import is_timed
from glm_training.trainers.base_trainer import BaseTrainer
from tests import dmdr_runs, preference_runs, runs

SHARED = [
    "training.max_steps=5",
    "training.optimizer=adamw",
    "training.adam_beta1=0.9",
    "training.learning_rate=1e-3",
    "training.batch_size=1",
    "logging.log_interval=3",
    "logging.save_interval=2",
    "logging.eval_interval=2",
    "logging.log_images=true",
    "logging.num_log_images=1",
    "evaluation.enabled=true",
    "checkpoint.save_total_limit=null",
]
LORA = ["lora.enabled=true", "lora.rank=2", "lora.alpha=4"]


def reward(folder: Path, *overrides: str) -> BaseTrainer:
    """Image to image, so that the monitors compare with the sources too; the gate checks at steps 1 and 4."""
    small = [
        "model.component=dit",
        "reward.grpo.num_samples=2",
        "reward.grpo.gate_interval=3",
        "evaluation.num_eval_samples=1",
    ]
    return runs.trainer_of(folder, *SHARED, *small, *LORA, "reward.grpo.kl_coef=0.1", *overrides, mode="i2i")


def supervised(folder: Path, *overrides: str) -> BaseTrainer:
    return runs.trainer_of(folder, *SHARED, "training.use_reward=false", "reward.enabled=false", *overrides)


def preference(folder: Path, *overrides: str) -> BaseTrainer:
    held_out = f"evaluation.eval_pairs={preference_runs.write_pairs(folder / 'held_out', bright=True)}"
    return preference_runs.trainer_of(folder, "sdxl", *SHARED, held_out, "training.batch_size=2", *overrides)


def distillation(folder: Path, *overrides: str) -> BaseTrainer:
    return dmdr_runs.trainer_of(folder, *SHARED, *LORA, *overrides)


def reproducible(path: Path) -> list[dict[str, Any]]:
    """The lines without what tells of the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_timed(name)} for line in lines]


def files_of(checkpoint: Path) -> dict[str, str]:
    return json.loads((checkpoint / "manifest.json").read_text())["files"]


EXPECTED = {
    reward: {"reward/total", "dit/kl", "gate/dit_ratio_max", "monitor/picture_change", "monitor/source_similarity"},
    supervised: {"ar/loss", "dit/loss", "eval/ar/loss", "eval/dit/loss"},
    preference: {"unet/loss", "eval/unet/accuracy"},
    distillation: {"unet/dmd_loss", "guidance/fake_loss", "dmdr/real_scale"},
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_resumed_run_logs_and_saves_the_same(tmp_path, kind: Callable[..., BaseTrainer]) -> None:
    run = tmp_path / "run"
    kind(tmp_path).train()
    lines, saved = reproducible(run / "metrics.jsonl"), files_of(run / "checkpoints/step-000005")
    scores = reproducible(run / "evaluations.jsonl") if (run / "evaluations.jsonl").is_file() else []
    assert EXPECTED[kind] <= {name for line in lines for name in line}
    assert [line["step"] for line in lines if not any(name.startswith("eval/") for name in line)] == [3, 5]
    kind(tmp_path, f"checkpoint.resume_from={run}/checkpoints/step-000002").train()
    assert reproducible(run / "metrics.jsonl") == lines
    if scores:
        assert reproducible(run / "evaluations.jsonl") == scores
    assert files_of(run / "checkpoints/step-000005") == saved
    assert (run / "samples/before_after.png").is_file()
