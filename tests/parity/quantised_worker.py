"""Two of these are a run of adapters over base weights in 4 bits: a step, and its weights to a file."""

import sys
from pathlib import Path

import torch

from glm_training.utils.distributed import World, init_world, shutdown
from tests.runs import trainer_of, weights_of

LEARNS = ["model.quantization=nf4", "lora.enabled=true", "lora.rank=4", "training.use_reward=false"]


def train(folder: Path, world: World) -> None:
    trainer = trainer_of(folder, "training.batch_size=2", *LEARNS, world=world)
    trainer.training_step()
    torch.save(weights_of(trainer), folder / f"quantised-{world.rank}.pt")


if __name__ == "__main__":
    world = init_world(True, "gloo")
    train(Path(sys.argv[1]), world)
    shutdown(world)
