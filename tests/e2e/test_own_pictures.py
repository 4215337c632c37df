"""The way of somebody new: 30 pictures of their own with captions, a short YAML, and no key that it does not name."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import GlmImagePipeline
from PIL import Image, ImageDraw

from glm_training.cli import main, training

SHAPES = [(128, 128), (192, 128), (128, 192), (320, 160), (150, 200), (131, 257)]
"""Width and height in pixels; the tiny model draws as many as 128 x 128 have."""

YAML = """\
model: {name: tiny, torch_dtype: float32}
data: {images: pictures}
lora: {enabled: true}
training:
  batch_size: 2
  gradient_accumulation_steps: 1
  max_steps: 20
  learning_rate: 1.0e-3
  warmup_steps: 2
  mixed_precision: "no"
evaluation: {num_inference_steps: 4}
output_dir: runs/mine
"""


def draw_pictures(folder: Path) -> None:
    """A coloured disc or square on grey, with what it is beside it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        width, height = SHAPES[number % len(SHAPES)]
        image = Image.new("RGB", (width, height), (128, 128, 128))
        name, colour = [("red", (220, 30, 30)), ("blue", (30, 30, 220)), ("green", (30, 160, 30))][number % 3]
        x, y = (int(rng.integers(30, side - 30)) for side in (width, height))
        shape = "circle" if number % 2 else "square"
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)([x - 25, y - 25, x + 25, y + 25], fill=colour)
        image.save(
            folder / f"IMG_{number:04d}.{'JPG' if number % 2 else 'png'}", **({"quality": 95} if number % 2 else {})
        )
        (folder / f"IMG_{number:04d}.txt").write_text(f"a {name} {shape} on grey\n", encoding="utf-8")


def run(monkeypatch: pytest.MonkeyPatch, entry: object, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as stop:
        entry()  # type: ignore[operator]
    return stop.value.code


def test_from_a_folder_to_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    assert len(YAML.splitlines()) <= 12
    (tmp_path / "mine.yaml").write_text(YAML, encoding="utf-8")
    started = time.perf_counter()

    assert run(monkeypatch, main.main, "glm-train", "data", "mine.yaml") == 0
    told = capsys.readouterr().out
    assert "30 pictures, read as a folder of pictures" in told and "faults    none" in told
    assert "of 30 (data.validation 0.05): " in told

    assert run(monkeypatch, training.main, "train.py", "--config", "mine.yaml") == 0
    told = capsys.readouterr().out
    assert "of 30 pictures held out" in told and "Judged on" in told and "held-out target" in told
    lines = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "eval/ar/loss" in line]
    assert [line["step"] for line in judged] == [0, 20]
    for name in ("eval/ar/loss", "eval/dit/loss"):
        assert judged[1][name] < judged[0][name]
    with Image.open(tmp_path / "runs/mine/samples/before_after.png") as grid:
        assert grid.width > 0
    assert list((tmp_path / "runs/mine/samples").glob("step-000020/*.png"))

    pipeline = GlmImagePipeline.from_pretrained(tmp_path / "runs/mine/checkpoints/step-000020/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle on grey", height=96, width=160, num_inference_steps=2).images[0]
    assert image.size == (160, 96)
    print(f"from a folder to a pipeline in {time.perf_counter() - started:.0f} s")
