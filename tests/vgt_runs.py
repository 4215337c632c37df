"""Small VGT runs for tests: the random tiny models at 32 px on six captioned pictures, well below a second per step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from glm_training.config import Config, load_config
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.loading import Models
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import World, init_world
from tests.runs import weights_of

CAPTIONS = ["a red circle", "two blue squares", "a green triangle", 'a sign that says "CAFE"', "noise", "a yellow dot"]


def write_pictures(folder: Path, count: int = len(CAPTIONS)) -> Path:
    """Noise pictures of 32 x 32 px with a caption each, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number] + "\n", encoding="utf-8")
    return folder


def config_of(folder: Path, *overrides: str, component: str = "autoencoder") -> Config:
    """Four steps on two pictures each, in fp32; a generator draws the latents of a random autoencoder."""
    path = folder / f"{component}.yaml"
    if not path.is_file():  # never while another process reads it
        write_pictures(folder / "pictures")
        VGT(Models(tiny_random_autoencoder(1))).save_pretrained(folder / "latents")
        path.write_text(yaml.safe_dump(_tree(folder, component)), encoding="utf-8")
    return load_config(path, list(overrides))


def _tree(folder: Path, component: str) -> dict[str, object]:
    own = {"distillation_weight": 0.5} if component == "autoencoder" else {"autoencoder": str(folder / "latents")}
    sampling = {"num_inference_steps": 2, "guidance_scale": 2.0, "parallel": 4}
    return {
        "seed": 3,
        "output_dir": str(folder / f"run_{component}"),
        "model": {
            "family": "vgt", "component": component, "name": "tiny-random", "torch_dtype": "float32",
            "generator": sampling,
        },
        "vgt": own,
        "data": {"images": str(folder / "pictures"), "num_workers": 0},
        "training": {
            "batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": 1e-3,
            "lr_scheduler": "constant", "warmup_steps": 0, "mixed_precision": "no", "gradient_checkpointing": False,
        },
        "evaluation": {"num_eval_samples": 3},
        "logging": {
            "log_interval": 1, "save_interval": 100, "eval_interval": 100, "num_log_images": 2,
            "use_tensorboard": False,
        },
    }  # fmt: skip


def trainer_of(
    folder: Path, *overrides: str, component: str = "autoencoder", world: World | None = None
) -> BaseTrainer:
    """A trainer on it, in this process."""
    return build_trainer(config_of(folder, *overrides, component=component), world or init_world(True, None))


def stepped(trainer: BaseTrainer, steps: int = 2) -> dict[str, dict[str, object]]:
    """The trained weights after so many steps."""
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return weights_of(trainer)
