"""Two of these are the run of test_sharded_failures: process 1 of a run in shards fails or is told to stop, and what
both say goes to a file."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm_training.checkpoint import disk
from glm_training.data.problems import DataError
from glm_training.engine.agreement import losses_explained
from glm_training.engine.errors import TrainingError
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.decode import DecoderLayer
from glm_training.rewards import RewardCalculator
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import DistributedError, World, barrier, init_world
from glm_training.utils.signals import Aborted
from tests.runs import trainer_of

RUN = ["distributed.strategy=fsdp", "training.batch_size=1", "training.max_steps=3"]
SUPERVISED = ["training.use_reward=false", "model.component=dit", "logging.save_interval=1"]
EVALUATED = ["evaluation.enabled=true", "evaluation.num_eval_samples=2", "logging.eval_interval=1"]
BLOCKS = "distributed.gather=block"
REWARDED = ["model.component=dit", *EVALUATED]
CASES: dict[str, list[str]] = {
    "full disk": SUPERVISED,
    "unseen": [*SUPERVISED, "checkpoint.save_dir=/proc/self/cwd/unseen"],
    "lost": [*SUPERVISED, "checkpoint.save_dir=/proc/self/cwd/lost"],
    "reward": [*REWARDED, "reward.metrics={tests.parity.sharded_failing_worker:Refusing: 1.0}"],
    "data": [*EVALUATED, "model.component=both"],
    "plans": [*REWARDED, BLOCKS],
    "plans of an evaluation": REWARDED,
    "token": [*EVALUATED, "model.component=both", BLOCKS],
    "SIGTERM in rollout": [*REWARDED, BLOCKS],
    "SIGTERM in DiT update": REWARDED,
    "SIGTERM in evaluation": REWARDED,
    "SIGTERM in saving": [*REWARDED, "logging.save_interval=1"],
    "weights": SUPERVISED,
    "aborted": SUPERVISED,
    "gathering": SUPERVISED,
}
"""What happens on process 1 in the second step: the disk is full while it writes its shard; its folder of checkpoints
is another one than that of process 0, from the start, or from then on; its reward raises; an image has gone; what
writes its plans fails, in a step or in the evaluation before it, or within a token of a half whose blocks are gathered
one at a time; a stop signal comes in a phase; a weight of its shard
is NaN as it saves. The last two end it: a second stop signal while it writes its shard,
and no memory for the weights that are gathered."""


class Refusing(RewardCalculator):
    """Has no answer in the second step of process 1."""

    calls = 0

    def compute_reward(self, generated_image, target_image, prompt):
        Refusing.calls += 1
        if os.environ["RANK"] == "1" and Refusing.calls > FIRST_STEP:
            raise RuntimeError("the judge has left")
        return 0.5


FIRST_STEP = 2 + 4
"""Pictures that a process scores in the evaluation before the first step, at most, and in that step."""


@contextmanager
def arranged(case: str, trainer: BaseTrainer, world: World) -> Iterator[None]:
    """Inside, the case happens in the second step of process 1."""
    phase, write, whole, rollout = trainer.phase, disk.write, DTensor.full_tensor, ARComponent.rollout
    batch, inside, now, token = trainer.dataset.batch, False, "", DecoderLayer.step

    @contextmanager
    def watched(name) -> Iterator[None]:
        nonlocal inside, now
        now = name
        step = trainer.step if name == "saving" else trainer.step + 1
        with phase(name):
            if world.rank == 1 and step == 2 and case == f"SIGTERM in {name}":
                os.kill(os.getpid(), signal.SIGTERM)
            inside = world.rank == 1 and step == 2 and name == "saving"
            if inside and case == "lost":
                os.chdir(FOLDER / "node-1")
            if inside and case == "weights":
                next(iter(trainer.parts["dit"].parameters.values())).to_local().data[-1] = math.nan
            yield
            inside = False

    def gathered(tensor: DTensor) -> Tensor:
        if inside and case == "gathering":
            raise torch.OutOfMemoryError("no memory left")
        return whole(tensor)

    def written(handle, data) -> None:
        if inside and case == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), handle.name)
        if inside and case == "aborted":
            raise Aborted(128 + signal.SIGINT)
        write(handle, data)

    def read(*args, **options):
        if case == "data" and world.rank == 1 and trainer.step == 1:
            raise DataError(["1.png has gone"])
        return batch(*args, **options)

    def planned(*args, **options):
        plans = rollout(*args, **options)
        if case == {"rollout": "plans", "evaluation": "plans of an evaluation"}.get(now):
            if world.rank == 1 and trainer.step == 1:
                raise RuntimeError("no plans")
        return plans

    def stepped(*args):
        if case == "token" and now == "rollout" and world.rank == 1 and trainer.step == 1:
            raise RuntimeError("no token")
        return token(*args)

    trainer.phase, disk.write, DTensor.full_tensor = watched, written, gathered  # type: ignore[method-assign, assignment]
    trainer.dataset.batch, ARComponent.rollout = read, planned  # type: ignore[method-assign, assignment]
    DecoderLayer.step = stepped  # type: ignore[method-assign]
    try:
        yield
    finally:
        disk.write, DTensor.full_tensor, ARComponent.rollout = write, whole, rollout  # type: ignore[method-assign]
        DecoderLayer.step = token  # type: ignore[method-assign]


def told_by(world: World, action: Callable[[], object]) -> str:
    try:
        with losses_explained(world):
            return repr(action())
    except (TrainingError, DistributedError, Aborted) as error:
        return f"{type(error).__name__}: {error}"


FOLDER = Path()


def run(folder: Path, case: str, world: World) -> None:
    """The case; after the full disk one more step and its save."""
    name = case.replace(" ", "_")
    os.chdir(folder / ("node-0" if case == "lost" else f"node-{world.rank}"))
    trainer = trainer_of(folder, *RUN, *CASES[case], f"output_dir={folder}/{name}", world=world)
    with arranged(case, trainer, world):
        told = told_by(world, trainer.train)
    if case == "full disk":
        resumed = trainer_of(
            folder, *RUN, *CASES[case], "checkpoint.resume_from=latest", f"output_dir={folder}/{name}", world=world
        )
        told += f"\n{told_by(world, resumed.train)}"
    (folder / f"{name}-{world.rank}.txt").write_text(told, encoding="utf-8")


if __name__ == "__main__":
    FOLDER, world = Path(sys.argv[1]), init_world(True, "gloo")
    (FOLDER / f"node-{world.rank}").mkdir(exist_ok=True)
    barrier(world)
    for each in sys.argv[2:] or CASES:
        run(FOLDER, each, world)
