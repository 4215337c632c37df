"""Held-out figures that a stop prevented are taken when the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

from glm_training.trainers.dpo_trainer import DPOTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world
from tests.preference_runs import config_of, write_pairs


def trainer(folder: Path, *overrides: str) -> DPOTrainer:
    held_out = [f"evaluation.eval_pairs={write_pairs(folder / 'pairs')}", "logging.eval_interval=2"]
    config = config_of(folder, "sdxl", *held_out, "logging.log_images=false", *overrides)
    built = build_trainer(config, init_world(True, None))
    assert isinstance(built, DPOTrainer)
    return built


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def validated(folder: Path) -> list[float]:
    return [line["step"] for line in lines(folder) if "eval/unet/loss" in line]


def test_a_resume_takes_the_figures_that_are_missing_and_no_others(tmp_path) -> None:
    trainer(tmp_path, "training.max_steps=2").train()
    assert validated(tmp_path) == [0, 2]
    resume = ["training.max_steps=4", "checkpoint.resume_from=latest"]
    trainer(tmp_path, *resume, "checkpoint.save_total_limit=null").train()
    assert validated(tmp_path) == [0, 2, 4]
    kept = [line for line in lines(tmp_path) if not ("eval/unet/loss" in line and line["step"] == 2)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    trainer(tmp_path, "training.max_steps=4", f"checkpoint.resume_from={tmp_path}/run/checkpoints/step-000002").train()
    assert sorted(validated(tmp_path)) == [0, 2, 4]


def test_without_evaluations_there_are_none(tmp_path) -> None:
    trainer(tmp_path, "evaluation.enabled=false").train()
    assert validated(tmp_path) == []
