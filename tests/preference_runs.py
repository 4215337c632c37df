"""Small preference runs for tests: four pairs at 64 px, on the random tiny SDXL or GLM-Image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from glm_training.config import Config, load_config
from glm_training.trainers.dpo_trainer import DPOTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import World, init_world

PROMPTS = ["a red circle", "a cat", 'a sign that says "CAFE"', "a photo of the green square"]


def write_pairs(folder: Path, *, bright: bool = False) -> Path:
    """Noise pictures, or with `bright` a preference for light ones, 72 x 64 px; nothing is written twice."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, prompt in enumerate(PROMPTS):
        for role, level in (("preferred", 160), ("rejected", 0)):
            low, high = (level, level + 95) if bright else (0, 255)
            pixels = rng.integers(low, high, (64, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}_{role}.png")
        lines.append({"prompt": prompt} | {role: f"images/{i}_{role}.png" for role in ("preferred", "rejected")})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def config_of(folder: Path, family: str, *overrides: str) -> Config:
    """Two steps of two pairs, fp32, SGD; adapters for SDXL's UNet, whole weights for GLM-Image's halves."""
    sdxl = family == "sdxl"
    tree: dict[str, Any] = {
        "seed": 3,
        "output_dir": str(folder / "run"),
        "model": {
            "family": family,
            "name": "tiny-random",
            "torch_dtype": "float32",
            "unet" if sdxl else "dit": {"num_inference_steps": 2, "guidance_scale": 1.0},
        },
        "data": {
            "pairs": str(write_pairs(folder / "pairs")),
            "image_size": {"height": 64, "width": 64},
            "num_workers": 0,
        },
        "training": {
            "method": "dpo",
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "learning_rate": 0.02 if sdxl else 2e-4,
            "optimizer": "sgd",
            "adam_beta1": 0.0,
            "max_grad_norm": 0,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "dpo": {"beta": 500.0, "cache_dir": str(folder / "cache")},
        "lora": {"enabled": sdxl, "rank": 4, "alpha": 4.0},
        "logging": {"log_interval": 1, "log_images": False, "use_tensorboard": False},
        "evaluation": {"num_eval_samples": 2},
        "checkpoint": {"save_total_limit": None, "save_lora_only": sdxl},
    }
    path = folder / f"{family}.yaml"
    text = yaml.safe_dump(tree)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:  # never while another process reads it
        path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def trainer_of(folder: Path, family: str, *overrides: str, world: World | None = None) -> DPOTrainer:
    """A trainer on it, in this process."""
    trainer = build_trainer(config_of(folder, family, *overrides), world or init_world(True, None))
    assert isinstance(trainer, DPOTrainer)
    return trainer


def stepped(folder: Path, family: str, *overrides: str, steps: int = 2, world: World | None = None) -> DPOTrainer:
    """A trainer after some steps of its own, without a run directory."""
    trainer = trainer_of(folder, family, *overrides, world=world)
    trainer.prepare()
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return trainer
