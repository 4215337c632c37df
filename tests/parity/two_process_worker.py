"""Run by torchrun from test_training_equivalences: one step of every kind, weights and drawn prompts to a file."""

import sys
from pathlib import Path

import torch

from glm_training.utils.distributed import init_world, shutdown
from tests.runs import trainer_of, weights_of

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = init_world(True, "gloo")
    for half in ("ar", "dit", "both"):
        for use_reward in ("true", "false"):
            trainer = trainer_of(
                folder,
                f"model.component={half}",
                f"training.use_reward={use_reward}",
                "training.batch_size=2",
                world=world,
            )
            indices = trainer.sampler.peek()
            trainer.training_step()
            torch.save(
                {"weights": weights_of(trainer), "indices": indices},
                folder / f"{half}-{use_reward}-{world.rank}.pt",
            )
    shutdown(world)
