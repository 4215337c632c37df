"""Small DMDR runs for tests: a family's random tiny model at 64 px on four prompts, well below a second per step."""

from __future__ import annotations

from pathlib import Path

import yaml

from examples.random_scorers import write_scorers
from glm_training.config import Config, load_config
from glm_training.trainers.dmdr_trainer import DMDRTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import World, init_world
from tests.runs import PROMPTS, weights_of


def config_of(folder: Path, *overrides: str, family: str = "sdxl") -> Config:
    """Four steps on two prompts each, in fp32, the generator updated at every second one."""
    model = {"family": family, "name": "tiny-random", "torch_dtype": "float32"}
    tree = {
        "seed": 3,
        "output_dir": str(folder / "run"),
        "model": model | ({"taesd": "tiny-random"} if family == "sdxl" else {}),
        "data": {
            "prompts_file": str(folder / "prompts.txt"),
            "image_size": {"height": 64, "width": 64},
            "num_workers": 0,
        },
        "training": {
            "method": "dmdr",
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "dmdr": {"guidance_rank": 2, "guidance_alpha": 2.0, "update_ratio": 2, "student_steps": 2},
        "logging": {"log_interval": 1, "save_interval": 100, "log_images": False, "use_tensorboard": False},
    }
    path = folder / f"{family}.yaml"
    if not path.is_file():  # never while another process reads it
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(path, list(overrides))


def trainer_of(folder: Path, *overrides: str, family: str = "sdxl", world: World | None = None) -> DMDRTrainer:
    """A trainer on it, in this process."""
    trainer = build_trainer(config_of(folder, *overrides, family=family), world or init_world(True, None))
    assert isinstance(trainer, DMDRTrainer)
    return trainer


def stepped(trainer: DMDRTrainer, steps: int = 2) -> dict[str, dict[str, object]]:
    """The trained weights after so many steps."""
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return weights_of(trainer)


def random_scorers(folder: Path) -> list[str]:
    """Keys that give a run scorers of random weights, and rewards from its first step on."""
    write_scorers(folder)
    keys = {
        "dmdr.cold_start_steps": 0,
        "dmdr.reward.clip_h_weights": folder / "clip_h" / "open_clip_pytorch_model.bin",
        "dmdr.reward.clip_h_architecture": f"local-dir:{folder / 'clip_h'}",
        "reward.options.hps_v2.weights": folder / "hps_v2" / "open_clip_pytorch_model.bin",
        "reward.options.hps_v2.architecture": f"local-dir:{folder / 'hps_v2'}",
    }
    return [f"{key}={value}" for key, value in keys.items()]
