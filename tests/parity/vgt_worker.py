"""Two of these are the run of test_vgt_processes: two steps of each of VGT's models, the weights to a file."""

import sys
from pathlib import Path

import torch

from glm_training.utils.distributed import init_world, shutdown
from tests.runs import weights_of
from tests.vgt_runs import stepped, trainer_of

SHARED = [
    "training.optimizer=sgd",
    "training.adam_beta2=0.999",
    "training.learning_rate=0.05",
    "training.adam_beta1=0",
    "training.max_grad_norm=0",
]
OWN = {
    "autoencoder": ["vgt.gan.start_step=0", "vgt.gan.channels=32", "vgt.gan.stages=2", "vgt.gan.lecam_weight=1"],
    "generator": [],
}

if __name__ == "__main__":
    world = init_world(True, "gloo")
    for component, own in OWN.items():
        trainer = trainer_of(Path(sys.argv[1]), *SHARED, *own, *sys.argv[2:], component=component, world=world)
        stepped(trainer)
        judged = trainer.judge()
        told = (weights_of(trainer), judged, getattr(trainer, "averages", None))
        torch.save(told, Path(sys.argv[1]) / f"{component}-{world.rank}.pt")
    shutdown(world)
