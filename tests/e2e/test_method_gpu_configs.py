"""The full-size configurations of preferences and distillation, every section executed on random tiny models."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from examples.random_scorers import write_scorers
from glm_training.models.sdxl.tiny import build_tiny

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.name=tiny-random",
    "model.torch_dtype=float32",
    "training.mixed_precision=no",
    "training.optimizer=adamw",
    "training.batch_size=1",
    "training.gradient_accumulation_steps=1",
    "data.image_size.height=64",
    "data.image_size.width=64",
    "evaluation.num_eval_samples=1",
    "logging.num_log_images=1",
]
DISTILLATION = ["model.taesd=tiny-random", "data.prompts_file=prompts.txt", "dmdr.update_ratio=1"]
SCORERS = [
    "dmdr.reward.clip_h_weights=scorers/clip_h/open_clip_pytorch_model.bin",
    "dmdr.reward.clip_h_architecture=local-dir:scorers/clip_h",
    "reward.options.hps_v2.weights=scorers/hps_v2/open_clip_pytorch_model.bin",
    "reward.options.hps_v2.architecture=local-dir:scorers/hps_v2",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Where the configurations find data, starting weights and scorers."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "data" / "preference", folder / "data" / "preference")
    (folder / "prompts.txt").write_text("a cat\na red circle\n", encoding="utf-8")
    torch.save(build_tiny(seed=7).unet.state_dict(), folder / "initial.bin")
    write_scorers(folder / "scorers")
    return folder


def train(folder: Path, monkeypatch, capfd, recwarn, name: str, *overrides: str) -> Path:
    """The run directory of `configs/name`, which must have nothing but its own lines to tell."""
    monkeypatch.chdir(folder)
    words = ["train.py", "--config", str(ROOT / "configs" / f"{name}.yaml"), *SMALL, *overrides]
    monkeypatch.setattr(sys, "argv", words)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    told = capfd.readouterr()
    assert stop.value.code == 0, told.err
    outdated = [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)]
    assert told.err == "" and outdated == []
    return folder / "runs" / name


def figures(run: Path) -> set[str]:
    return set().union(*(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()))


def test_preferences(workplace, monkeypatch, capfd, recwarn) -> None:
    data = ["data.pairs=data/preference", "training.max_steps=1", "model.unet.num_inference_steps=2"]
    run = train(workplace, monkeypatch, capfd, recwarn, "sdxl_dpo_lora", *data)
    assert {"unet/loss", "unet/accuracy", "unet/margin"} <= figures(run)
    assert (run / "lora" / "step-000001" / "unet" / "pytorch_lora_weights.safetensors").is_file()
    assert (run / "samples" / "step-000000" / "0.png").is_file()


def test_two_stages_of_a_one_step_sdxl(workplace, monkeypatch, capfd, recwarn) -> None:
    given = [*DISTILLATION, "dmdr.initial_weights=initial.bin"]
    first = train(workplace, monkeypatch, capfd, recwarn, "sdxl_dmdr_cold_start", *given, "training.max_steps=1")
    assert {"unet/dmd_loss", "guidance/fake_loss"} <= figures(first)
    stage = ["checkpoint.resume_from=runs/sdxl_dmdr_cold_start/checkpoints/torch_units/step-000001.pt"]
    lengths = ["training.max_steps=2", "dmdr.cold_start_steps=1"]
    accept = "resume.accept=[training.batch_size, training.learning_rate, dmdr, reward.options]"
    second = train(workplace, monkeypatch, capfd, recwarn, "sdxl_dmdr_refl", *given, *SCORERS, *stage, *lengths, accept)
    assert {"unet/reward_loss", "unet/score_clip_h", "unet/score_hps_v2"} <= figures(second)
    lines = (second / "loss_logs" / "loss_gen_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


def test_four_steps(workplace, monkeypatch, capfd, recwarn) -> None:
    lengths = ["training.max_steps=2", "dmdr.cold_start_steps=1"]
    run = train(workplace, monkeypatch, capfd, recwarn, "sdxl_dmdr_4step", *DISTILLATION, *SCORERS, *lengths)
    assert {"dmdr/real_scale", "unet/reward_loss"} <= figures(run)
    scheduler = json.loads((run / "checkpoints/step-000002/pipeline/scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler" and scheduler["original_inference_steps"] == 4


def test_glm_image_in_four_steps(workplace, monkeypatch, capfd, recwarn) -> None:
    given = ["data.prompts_file=prompts.txt", "dmdr.update_ratio=1", "training.max_steps=1"]
    run = train(workplace, monkeypatch, capfd, recwarn, "glm_dit_distill", *given)
    assert {"dit/dmd_loss", "guidance/fake_loss"} <= figures(run)
    saved = run / "checkpoints" / "step-000001"
    assert (saved / "lora_dit" / "adapter_model.safetensors").is_file()
    assert (saved / "lora_guidance" / "adapter_model.safetensors").is_file()


def test_own_pictures(workplace, monkeypatch, capfd, recwarn) -> None:
    data = [f"data.images={ROOT}/data/t2i", "data.buckets.smallest=64", "data.min_side=0", "training.max_steps=1"]
    keys = [*data, "model.unet.num_inference_steps=2", "evaluation.num_eval_samples=1"]
    run = train(workplace, monkeypatch, capfd, recwarn, "sdxl_finetune_lora", *keys)
    assert {"unet/loss", "eval/unet/loss"} <= figures(run)
    assert (run / "lora" / "step-000001" / "unet" / "pytorch_lora_weights.safetensors").is_file()
