"""Two of these are the run of test_bucket_processes: three steps of every case on pictures of three shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, init_world, shutdown
from tests.data.captioned.building import noise
from tests.preference_runs import trainer_of as pairs_trainer_of
from tests.runs import trainer_of, weights_of

SHAPES = [(100, 100), (300, 100), (90, 64), (100, 300), (192, 64), (64, 64)]
"""(width, height): three of 64 x 64 px in a batch, two of 32 x 96 and one of 96 x 32: four batches of 2, 2, 1 and 1."""

SHARED = ["data.buckets={enabled: true, smallest: 32}", "training.batch_size=2"]
CASES: dict[str, tuple[str, list[str]]] = {
    "supervised": ("t2i", ["training.use_reward=false"]),
    "reward": (
        "t2i",
        ["reward.grpo.num_samples=4", "reward.grpo.updates_per_rollout=2", "rollout.micro_batch_size=3"],
    ),
    "nft": ("t2i", ["model.component=dit", "reward.grpo.dit.method=nft", "reward.grpo.dit.old_decay=0.5"]),
    "edits": ("i2i", []),
    "pairs": ("pairs", ["model.component=both", "training.learning_rate=1e-2"]),
}
"""Name -> mode, or that it is of pairs, and overrides."""


def write_shapes(folder: Path) -> None:
    """Six prompts, each with a target and a source of one shape."""
    for name in ("target_images", "source_images"):
        (folder / name).mkdir(parents=True)
        for number, shape in enumerate(SHAPES):
            (folder / name / f"{number}.png").write_bytes(noise(number + 50 * (name == "source_images"), shape))
    prompts = "".join(f"picture {number}\n" for number in range(len(SHAPES)))
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")


def write_shaped_pairs(folder: Path) -> None:
    """Six pairs, both images of a pair of one shape."""
    folder.mkdir(parents=True)
    lines = []
    for number, shape in enumerate(SHAPES):
        files = {role: f"{number}_{role}.png" for role in ("preferred", "rejected")}
        for place, file in enumerate(files.values()):
            (folder / file).write_bytes(noise(number + 50 * place, shape))
        lines.append(json.dumps({"prompt": f"picture {number}"} | files) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def trained(folder: Path, case: str, *overrides: str, world: World | None = None) -> dict[str, object]:
    """Weights after three steps, and what was drawn in each."""
    mode, keys = CASES[case]
    trainer: BaseTrainer
    if mode == "pairs":
        trainer = pairs_trainer_of(folder / "preference", "glm_image", *SHARED, *keys, *overrides, world=world)
        trainer.prepare()
    else:
        trainer = trainer_of(folder, *SHARED, *keys, *overrides, mode=mode, world=world)
    before = weights_of(trainer)
    drawn: list[list[str]] = []
    next_batch = trainer.next_batch

    def noted():
        batch, positions = next_batch()
        drawn[-1].extend(batch.prompts)
        return batch, positions

    trainer.next_batch = noted  # type: ignore[method-assign]
    for _ in range(3):
        drawn.append([])
        trainer.training_step()
        trainer.step += 1
    return {"before": before, "weights": weights_of(trainer), "drawn": drawn}


if __name__ == "__main__":
    world = init_world(True, "gloo")
    for case in CASES:
        torch.save(trained(Path(sys.argv[1]), case, world=world), Path(sys.argv[1]) / f"{case}-{world.rank}.pt")
    shutdown(world)
