"""Two of these are the run of test_failing_processes: one of them fails, and what both raise goes to a file."""

from __future__ import annotations

import errno
import math
import os
import sys
from pathlib import Path

from glm_training.checkpoint import disk
from glm_training.checkpoint.state_tree import local_part
from glm_training.data import DataError, Problem
from glm_training.engine.errors import TrainingError
from glm_training.methods.supervised import FlowMatching
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, init_world
from tests.runs import trainer_of

SUPERVISED = ["training.use_reward=false", "model.component=dit", "training.batch_size=1", "training.max_steps=3"]
CASES = ("data", "forward pass", "gradient", "disk", "death")
"""What fails in the second step: an image of process 1; its forward pass, right before the backward pass that waits for
both; the gradient, on both; the save, on process 0; process 1 itself, which comes last."""


def arrange(case: str, trainer: BaseTrainer, world: World) -> None:
    """Makes the case fail when the trainer is in its second step."""
    batch, loss, step = trainer.dataset.batch, FlowMatching.loss, trainer.parts["dit"].step

    def failing_batch(*arguments, **options):
        if trainer.step == 1 and world.rank == 1 and case == "data":
            raise DataError([Problem(Path("images/7.png"), "does not exist", "Put the image there")])
        if trainer.step == 1 and world.rank == 1 and case == "death":
            os._exit(9)
        return batch(*arguments, **options)

    def failing_loss(*arguments, **options):
        term = loss(*arguments, **options)
        if trainer.step == 1 and world.rank == 1 and case == "forward pass":
            raise FloatingPointError("the velocity is NaN")
        return term

    def failing_step(number: int):
        if trainer.step == 1 and case == "gradient":
            local_part(next(iter(trainer.parts["dit"].parameters.values())).grad)[...] = math.nan
        return step(number)

    trainer.dataset.batch = failing_batch  # type: ignore[method-assign]
    FlowMatching.loss = failing_loss  # type: ignore[method-assign]
    trainer.parts["dit"].step = failing_step  # type: ignore[method-assign]
    if case == "disk":

        def full(*arguments):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.make_folder = full


def run(folder: Path, case: str, world: World) -> None:
    real_loss, real_disk = FlowMatching.loss, disk.make_folder
    keys = [*SUPERVISED, *sys.argv[2:], f"output_dir={folder}/{case.replace(' ', '_')}"]
    trainer = trainer_of(folder, *keys, world=world)
    arrange(case, trainer, world)
    try:
        trainer.train()
    except TrainingError as error:
        (folder / f"{case}-{world.rank}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    FlowMatching.loss, disk.make_folder = real_loss, real_disk  # type: ignore[method-assign]


if __name__ == "__main__":
    world = init_world(True, "gloo")
    for case in CASES:
        run(Path(sys.argv[1]), case, world)
