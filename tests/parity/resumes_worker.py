"""One of the processes of `resumes`: runs that save after two of four steps, or that go on from what others saved."""

import sys
from collections.abc import Sequence
from pathlib import Path

from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, init_world, shutdown
from tests.parity.arms_worker import STEPS, place_of, trainer_of

ARMS = {1: ("alone",), 2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}
"""Processes -> how they share the work."""
WAYS = [f"{arm}-{processes}" for processes, arms in ARMS.items() for arm in arms]


def checkpoint_of(run: Path, step: int) -> Path:
    """Where a run has saved."""
    return run / f"checkpoints/step-{step:06d}"


def trainer(folder: Path, case: str, way: str, origin: str | None, world: World, scorers: Sequence[str]) -> BaseTrainer:
    """Of a run that shares its work as `way` says, from the start or from what `origin` saved half the way."""
    keys = [f"logging.save_interval={STEPS // 2}", "resume.accept=[training.batch_size]"]
    if origin is not None:
        keys.append(f"checkpoint.resume_from={checkpoint_of(place_of(folder, case, origin), STEPS // 2)}")
    run = place_of(folder, case, way if origin is None else f"{origin}-to-{way}")
    return trainer_of(folder, case, way.partition("-")[0], world, scorers, [*keys, f"output_dir={run}"])


def main() -> None:
    folder, cases, origins, scorers = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","), sys.argv[4:]
    world = init_world(True, "gloo")
    for case in cases:
        for arm in ARMS[world.world_size]:
            for origin in origins:
                trainer(folder, case, f"{arm}-{world.world_size}", origin or None, world, scorers).train()
    shutdown(world)


if __name__ == "__main__":
    main()
