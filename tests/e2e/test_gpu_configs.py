"""The configurations for the real model, every section executed: one step of train.py on the random tiny model."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.reward_files import write_aesthetic, write_alexnet
from tests.runs import write_data

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.name=tiny-random",
    "model.dit.num_inference_steps=2",
    "rollout.num_inference_steps=2",
    "data.image_size.height=64",
    "data.image_size.width=64",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=1",
    "evaluation.num_eval_samples=1",
    "logging.num_log_images=1",
]


def lay_out_data(folder: Path, mode: str) -> None:
    """Data where the configurations look for it."""
    data = folder / "data" / mode
    for place in (data, data / "held_out"):
        write_data(place)
        if mode == "t2i":
            shutil.rmtree(place / "source_images")


@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_one_step(mode, tmp_path, monkeypatch, capfd, recwarn):
    lay_out_data(tmp_path, mode)
    aesthetic = write_aesthetic(tmp_path)
    files = [
        f"reward.options.lpips.backbone_weights={write_alexnet(tmp_path / 'alexnet.pth')}",
        f"reward.options.aesthetic.clip_name={aesthetic.clip_name}",
        f"reward.options.aesthetic.mlp_weights={aesthetic.mlp_weights}",
    ]
    config = ROOT / "configs" / f"{mode}_training.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), "--mode", mode, *SMALL, *files])
    capfd.readouterr()  # what writing the files above had to tell
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    told = capfd.readouterr()
    assert stop.value.code == 0, told.err
    outdated = [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)]
    assert told.err == "" and outdated == [], "nothing but the run's own lines is to be seen"
    run = tmp_path / "runs" / f"{mode}_training"
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = set().union(*figures)
    metrics = ["lpips", "aesthetic", "text_accuracy"] + (["structure"] if mode == "i2i" else [])
    assert {f"eval/{name}" for name in metrics if name != "text_accuracy"} <= scores
    assert {"ar/loss", "dit/loss", "ar/kl", "dit/kl", "gate/ar_log_prob_max", "gate/dit_ratio_max"} <= scores
    for half in ("ar", "dit"):
        assert (run / "lora" / "step-000001" / half / "adapter_model.safetensors").is_file()
    saved = run / "checkpoints" / "step-000001"
    assert saved.is_dir() and not (saved / "pipeline").exists()
    assert Image.open(run / "samples" / "step-000001" / "0.png").size == (64, 64)
    assert any((run / "tensorboard").iterdir())
