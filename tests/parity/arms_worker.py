"""Several of these are a run of test_arms: four steps of each case under a strategy, the weights to files."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, init_world, shutdown
from tests import dmdr_runs, preference_runs, runs, vgt_runs

ROWS, STEPS = 4, 4
"""Prompts, pairs or pictures of a step, however many processes share them; and steps of each case."""
RULES = {
    "sgd": ["training.optimizer=sgd", "training.adam_beta1=0", "training.adam_beta2=0.999"],
    # an epsilon above the rounding of gradients: with a smaller one their signs alone would count where they vanish
    "adam": ["training.optimizer=adamw", "training.adam_beta1=0.9", "training.adam_epsilon=1e-4"],
}
ADAPTERS = ["lora.enabled=true", "lora.rank=2", "lora.alpha=4"]
WHOLE = ["lora.enabled=false"]
GAN = ["vgt.gan.start_step=0", "vgt.gan.channels=32", "vgt.gan.stages=2", "vgt.gan.lecam_weight=1"]
FLAT = ["model.ar.top_p=1", "model.ar.temperature=10"]
"""Plans are drawn of probabilities that hardly feel weights which differ by their rounding. A step draws 4160 tokens:
from sharper ones a token would sooner or later be another one, and all after it; and the edge of a nucleus jumps."""
Weights = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Kind:
    """A kind of training: its trainer's maker, and its keys; learning rates for SGD, by what is trained."""

    made_by: str
    of: str
    keys: tuple[str, ...] = ()
    rate: float = 0.05
    rate_of_adapters: float | None = 0.05


KINDS = {
    "grpo-ar": Kind("reward", "t2i", ("model.component=ar", *FLAT), 0.2, 0.2),
    "grpo-dit": Kind("reward", "t2i", ("model.component=dit",)),
    "grpo-both": Kind("reward", "t2i", ("model.component=both", *FLAT), 0.2, 0.2),
    "sft": Kind("reward", "t2i", ("model.component=both", "training.use_reward=false")),
    "dpo": Kind("preference", "glm_image", (), 2e-4, 2e-4),
    "dpo-sdxl": Kind("preference", "sdxl", ("checkpoint.save_lora_only=false",), 2e-4, 0.02),
    "dmdr": Kind("dmdr", "glm_image"),
    "dmdr-sdxl": Kind("dmdr", "sdxl"),
    "vgt-autoencoder": Kind("vgt", "autoencoder", tuple(GAN), 0.05, None),
    "vgt-generator": Kind("vgt", "generator", (), 0.05, None),
}
CASES = [
    f"{kind}/{rule}/{what}"
    for kind in KINDS
    for rule in RULES
    for what in ("whole", "adapters")
    if what == "whole" or KINDS[kind].rate_of_adapters is not None
]
ARMS = {2: ("ddp", "fsdp"), 4: ("hsdp",)}
"""Processes -> how they may share the work."""
SHARING = {
    "alone": [],
    "ddp": ["distributed.strategy=ddp"],
    "fsdp": ["distributed.strategy=fsdp"],
    "hsdp": ["distributed.strategy=fsdp", "distributed.shard_size=2"],
}


def place_of(folder: Path, case: str, arm: str) -> Path:
    """Where a case writes under an arm."""
    return folder / f"{case.replace('/', '-')}-{arm}"


def trainer_of(
    folder: Path, case: str, arm: str, world: World, scorers: Sequence[str], more: Sequence[str] = ()
) -> BaseTrainer:
    """The trainer of a case in this process. `scorers`: keys that give DMDR rewards; `more`: for any."""
    name, rule, what = case.split("/")
    kind = KINDS[name]
    rate = 1e-3 if rule == "adam" else kind.rate if what == "whole" else kind.rate_of_adapters
    keys = [
        *RULES[rule],
        *(ADAPTERS if what == "adapters" else WHOLE),
        *kind.keys,
        *SHARING[arm],
        f"training.learning_rate={rate}",
        f"training.batch_size={ROWS // world.world_size}",
        f"training.max_steps={STEPS}",
        "training.max_grad_norm=0",
        f"output_dir={place_of(folder, case, arm)}",
        *more,
    ]
    place = folder / kind.made_by
    place.mkdir(exist_ok=True)
    if kind.made_by == "reward":
        return runs.trainer_of(place, *keys, mode=kind.of, world=world)
    if kind.made_by == "preference":
        cache = f"dpo.cache_dir={place_of(folder, case, arm)}/pairs"
        return preference_runs.trainer_of(place, kind.of, *keys, cache, world=world)
    if kind.made_by == "dmdr":
        return dmdr_runs.trainer_of(place, *keys, *scorers, family=kind.of, world=world)
    return vgt_runs.trainer_of(place, *keys, component=kind.of, world=world)


def weights_after(trainer: BaseTrainer) -> Weights:
    """Its trained weights, whole, after the steps, without a run directory."""
    Path(trainer.config.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.prepare()
    for _ in range(STEPS):
        trainer.training_step()
        trainer.step += 1
    return runs.weights_of(trainer)


if __name__ == "__main__":
    given, pairs, scorers = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    world = init_world(True, "gloo")
    for case, arm in (pair.split(":") for pair in pairs):
        weights = weights_after(trainer_of(given, case, arm, world, scorers))
        torch.save(weights, place_of(given, case, arm) / f"weights-{world.rank}.pt")
    shutdown(world)
