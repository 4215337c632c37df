"""A newcomer's way from the first run to a picture of the exported model, as commands in processes of their own, timed:
the quickstart, its page, a reward and pictures of one's own, a benchmark, an export that stock diffusers draws with."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.warm import Program

ROOT = Path(__file__).parents[2]
SHORT = (
    "training.max_steps=2",
    "training.batch_size=2",
    "rollout.plans_per_prompt=4",
    "evaluation.num_eval_samples=2",
    "evaluation.samples_per_prompt=1",
    "logging.save_interval=2",
)
REWARD = """
from glm_training.rewards import RewardCalculator


class Red(RewardCalculator):
    def compute_reward(self, generated_image, target_image, prompt):
        return sum(generated_image.resize((8, 8)).getchannel("R").tobytes()) / (255 * 64)
"""
OWN = """
model: {name: tiny, torch_dtype: float32, component: dit}
data: {images: pics, validation: 0.25}
lora: {enabled: true}
training: {batch_size: 2, max_steps: 2, learning_rate: 1.0e-3, warmup_steps: 1, mixed_precision: "no"}
output_dir: runs/own_pictures
"""
STOCK = """
import sys
import torch
from diffusers import GlmImagePipeline
torch.manual_seed(0)
pipe = GlmImagePipeline.from_pretrained(sys.argv[1])
drawn = pipe(prompt="a red circle", height=128, width=128, num_inference_steps=2, guidance_scale=1.0)
drawn.images[0].save(sys.argv[2])
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "own.yaml").write_text(OWN)
    (tmp_path / "pics").mkdir()
    for number, prompt in enumerate((ROOT / "data/t2i/prompts.txt").read_text().splitlines()[:8]):
        shutil.copy(ROOT / f"data/t2i/target_images/{number}.png", tmp_path / f"pics/{number}.png")
        (tmp_path / f"pics/{number}.txt").write_text(prompt)
    return tmp_path


def test_the_whole_way(clone):
    spent: dict[str, float] = {}

    def run(name: str, *words: str) -> str:
        started = time.monotonic()
        done = Program(*words, directory=clone, changes={"PYTHONPATH": str(ROOT)}).ended()
        spent[name] = time.monotonic() - started
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        return done.stdout

    glm_train = ("-m", "glm_training.cli.main")
    run("quickstart", "train.py", "--config", "configs/quickstart.yaml", *SHORT)
    page = (clone / "runs/quickstart/report.html").read_text(encoding="utf-8")
    assert "exactly right" in page and not re.search(r"(?:src|href)=[\"']?https?:", page)

    run(
        *("own reward", "train.py", "--config", "configs/quickstart.yaml", *SHORT, "output_dir=runs/own_reward"),
        *("reward.dit.weights=null", 'reward.metrics={"my_reward:Red": 1.0}', "reward.monitors.action=warn"),
    )
    lines = (clone / "runs/own_reward/metrics.jsonl").read_text().splitlines()
    rewards = [row["reward/total"] for line in lines if "reward/total" in (row := json.loads(line))]
    assert len(rewards) == 2 and all(0 < reward < 1 for reward in rewards)

    run("own pictures", "train.py", "--config", "own.yaml")
    assert (clone / "runs/own_pictures/checkpoints/step-000002/lora_dit/adapter_model.safetensors").is_file()

    prompts = clone / "two.jsonl"
    prompts.write_text("".join((ROOT / "data/benchmarks/text_tiny.jsonl").read_text().splitlines(True)[:2]))
    evaluate = ("evaluate", "--suite", "text", "--prompts", str(prompts), "--model", "runs/quickstart")
    run("evaluate", *glm_train, *evaluate, "--steps", "2", "--samples", "1", "--out", "runs/text")
    assert json.loads((clone / "runs/text/results.json").read_text())

    export = ("export", "runs/quickstart", "--format", "pipeline", "--out", "exported")
    told = run("export", *glm_train, *export)
    assert "bit for bit" in told and "so does the stock pipeline's own call" in told, told  # the trainer's picture
    run("stock", "-c", STOCK, "exported", "stock.png")
    run("stock, of the checkpoint", "-c", STOCK, "runs/quickstart/checkpoints/step-000002/pipeline", "saved.png")
    drawn, saved = (np.asarray(Image.open(clone / name)) for name in ("stock.png", "saved.png"))
    assert drawn.shape == (128, 128, 3) and drawn.std() > 10 and (drawn == saved).all()
    print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent.items()))
