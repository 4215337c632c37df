"""Several of these are the run of test_dmdr_processes: two steps of each family, the weights to a file."""

import sys
from pathlib import Path

import torch

from glm_training.utils.distributed import init_world, shutdown
from tests.dmdr_runs import stepped, trainer_of
from tests.runs import weights_of

SHARED = ["training.optimizer=sgd", "training.learning_rate=0.05", "training.adam_beta1=0", "training.max_grad_norm=0"]

if __name__ == "__main__":
    world = init_world(True, "gloo")
    for family in ("sdxl", "glm_image"):
        trainer = trainer_of(Path(sys.argv[1]), *SHARED, *sys.argv[2:], family=family, world=world)
        stepped(trainer)
        torch.save(weights_of(trainer), Path(sys.argv[1]) / f"{family}-{world.rank}.pt")
    shutdown(world)
