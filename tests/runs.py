"""Small runs for tests: the random tiny model at 64 px on four prompts, a second or two per step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from glm_training.checkpoint.state_tree import gather_shards
from glm_training.config import Config, load_config
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import World, init_world

PROMPTS = ["a red circle", 'a sign that says "CAFE"', "two blue squares left of a dog", "a green triangle"]


def write_data(folder: Path) -> None:
    """Prompts with noise pictures as targets and sources."""
    rng = np.random.default_rng(0)
    for name in ("target_images", "source_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(len(PROMPTS)):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")


def write_config(folder: Path, mode: str = "t2i") -> Path:
    """A YAML file of a run on `write_data`'s pictures: two steps, fp32, SGD, SSIM as the reward."""
    data = folder / "data"
    if not data.is_dir():
        write_data(data)
    tree = {
        "seed": 3,
        "output_dir": str(folder / "run"),
        "model": {
            "name": "tiny-random",
            "torch_dtype": "float32",
            "dit": {"num_inference_steps": 3, "guidance_scale": 1.0},
        },
        "data": {
            "prompts_file": str(data / "prompts.txt"),
            "target_images_dir": str(data / "target_images"),
            "image_size": {"height": 64, "width": 64},
            "num_workers": 0,
        },
        "training": {
            "mode": mode,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "learning_rate": 0.05,
            "optimizer": "sgd",
            "adam_beta1": 0.0,
            "max_grad_norm": 0,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "reward": {"metrics": {"structure": 1.0}, "options": {"structure": {"reference": "target"}}},
        "logging": {"log_interval": 1, "log_images": False, "use_tensorboard": False},
        "evaluation": {"enabled": False, "num_eval_samples": 2},
        "checkpoint": {"save_total_limit": None},
    }
    if mode == "i2i":
        tree["data"]["source_images_dir"] = str(data / "source_images")  # type: ignore[index]
    path = folder / f"{mode}.yaml"
    text = yaml.safe_dump(tree)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:  # never while another process reads it
        path.write_text(text, encoding="utf-8")
    return path


def config_of(folder: Path, *overrides: str, mode: str = "t2i") -> Config:
    """`write_config`'s file, loaded with overrides."""
    return load_config(write_config(folder, mode), list(overrides))


def trainer_of(folder: Path, *overrides: str, mode: str = "t2i", world: World | None = None) -> BaseTrainer:
    """A trainer on it, in this process."""
    return build_trainer(config_of(folder, *overrides, mode=mode), world or init_world(True, None))


def weights_of(trainer: BaseTrainer) -> dict[str, dict[str, object]]:
    """Copies of the trained weights, by half and name."""
    return {
        name: {key: gather_shards(value.detach()).clone() for key, value in part.parameters.items()}
        for name, part in trainer.parts.items()
    }
