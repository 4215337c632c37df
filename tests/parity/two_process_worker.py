"""Two of these are the run of test_training_equivalences: two steps of every case, weights and prompts to a file."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from glm_training.engine.errors import ScoringError
from glm_training.rewards import RewardCalculator, RewardSampleError
from glm_training.utils.distributed import World, init_world, shutdown
from tests.opd_runs import OPD
from tests.runs import trainer_of, weights_of

CASES: dict[str, tuple[str, list[str]]] = {
    "ar": ("t2i", ["model.component=ar"]),
    "flow_grpo": ("t2i", ["model.component=both"]),
    "rescored": (
        "t2i",
        [
            "model.component=both",
            "rollout.rescore=true",
            "reward.grpo.updates_per_rollout=2",
            "reward.grpo.dit.noise_weighting=true",
            "reward.grpo.dit.kl_form=velocity",
        ],
    ),
    "nft": ("t2i", ["model.component=both", "reward.grpo.dit.method=nft", "reward.grpo.dit.old_decay=0.5"]),
    "dgpo": ("t2i", ["model.component=both", "reward.grpo.dit.method=dgpo", "reward.grpo.updates_per_rollout=2"]),
    "stage": (
        "t2i",
        [
            "model.component=ar",
            "reward.grpo.num_samples=4",
            "rollout.micro_batch_size=3",
            "reward.grpo.ar.similarity_weighting=true",
            "reward.grpo.ar.entropy_reward=0.4",
            "reward.grpo.ar.skip_flat_groups=true",
        ],
    ),
    "opd": ("t2i", [*OPD, "rollout.plans_per_prompt=2", "rollout.micro_batch_size=1"]),
    "edits": ("i2i", ["model.component=both"]),
    "supervised": ("t2i", ["model.component=both", "training.use_reward=false"]),
    "token_mean": (
        "t2i",
        [
            "model.component=ar",
            "reward.grpo.loss_aggregation=token_mean",
            "reward.grpo.num_samples=4",
            "rollout.micro_batch_size=3",
            "training.batch_size=1",
            "training.gradient_accumulation_steps=2",
        ],
    ),
    "unscored": (
        "t2i",
        [
            "reward.metrics={tests.parity.two_process_worker:RefusesCircles: 1.0}",
            "reward.on_error=skip",
            "reward.grpo.updates_per_rollout=2",
            "rollout.micro_batch_size=2",
        ],
    ),
    "resampled": (
        "t2i",
        [
            "reward.metrics={tests.parity.two_process_worker:AlikeCircles: 1.0}",
            "reward.grpo.max_resamples=1",
            "data.shuffle=false",
        ],
    ),
}
"""Name -> mode and overrides; each prompt has the same group of images on one process and on two.

Two prompts per process and step: as one batch, or, in "token_mean", as two chunks whose four plans go through the model
in slices of three and one. In "unscored" one prompt has no scores, so that one process has fewer than the other, and in
"resampled" one process alone has a prompt to draw anew.
"""


ENCODED = ("edits", "supervised")
"""Cases whose pictures both processes encode ahead, into one cache; one process alone encodes them as they come."""


class RefusesAll(RewardCalculator):
    """No sample has a score."""

    def compute_reward(self, generated_image, target_image, prompt):
        raise RewardSampleError(f"rank {os.environ['RANK_OF_A_TEST']} has no eyes")


class RefusesCircles(RewardCalculator):
    """Mean brightness; a circle has no score."""

    def compute_reward(self, generated_image, target_image, prompt):
        if "circle" in prompt:
            raise RewardSampleError("a circle")
        return float(np.asarray(generated_image).mean() / 255)


class AlikeCircles(RewardCalculator):
    """Mean brightness; pictures of a circle are all alike."""

    def compute_reward(self, generated_image, target_image, prompt):
        return 0.5 if "circle" in prompt else float(np.asarray(generated_image).mean() / 255)


EVALUATED = ["model.component=dit", "training.max_steps=1", "evaluation.enabled=true", "evaluation.num_eval_samples=3"]


def train(folder: Path, world: World) -> None:
    for case, (mode, overrides) in CASES.items():
        given = [key.replace("FOLDER", str(folder)) for key in (*overrides, *sys.argv[2:])]
        trainer = trainer_of(folder, "training.batch_size=2", *given, mode=mode, world=world)
        if case in ENCODED:
            trainer.prepare()
        indices = []
        for _ in range(2):
            indices.append(trainer.sampler.peek())
            trainer.training_step()
            trainer.step += 1
        torch.save({"weights": weights_of(trainer), "indices": indices}, folder / f"{case}-{world.rank}.pt")


def evaluate(folder: Path, world: World) -> None:
    """Three prompts for two processes; then a run in which one of them is told to stop before it began."""
    trainer = trainer_of(folder, *EVALUATED, *sys.argv[2:], f"output_dir={folder}/pair", world=world)
    trainer.train()
    first = trainer.evaluations.before
    assert first is not None
    trainer = trainer_of(folder, *EVALUATED, *sys.argv[2:], f"output_dir={folder}/stopped", world=world)
    trainer.signals.received = signal.SIGTERM if world.rank == 1 else None
    result = trainer.train()
    found = {"scores": first.scores, "images": first.images, "stopped": [result.step, int(result.stopped_by or 0)]}
    torch.save(found, folder / f"evaluation-{world.rank}.pt")


def score_nothing(folder: Path, world: World) -> None:
    """A run none of whose samples has a score, each process for a reason of its own."""
    os.environ["RANK_OF_A_TEST"] = str(world.rank)
    calculator = "reward.calculator=tests.parity.two_process_worker:RefusesAll"
    overrides = [calculator, "reward.on_error=skip", "reward.grpo.gate=false", f"output_dir={folder}/nothing"]
    trainer = trainer_of(folder, *overrides, world=world)
    try:
        trainer.train()
    except ScoringError as error:
        (folder / f"nothing-{world.rank}.txt").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    world = init_world(True, "gloo")
    train(Path(sys.argv[1]), world)
    evaluate(Path(sys.argv[1]), world)
    score_nothing(Path(sys.argv[1]), world)
    shutdown(world)
