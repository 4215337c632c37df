"""Two of these are the run of test_sharded: update rules on shards, and runs in shards that are saved and continued."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.optimizers import build_optimizer
from glm_training.utils.distributed import World, init_world, shutdown
from tests.runs import config_of, trainer_of

RULES = ("adamw", "sgd", "muon", "lion", "adamw_schedule_free", "adafactor", "prodigy")
SHARDED = ["distributed.strategy=fsdp", "training.batch_size=2"]
ADAM = [
    "training.optimizer=adamw",
    "training.adam_beta1=0.9",
    "training.adam_epsilon=1e-4",
    "training.learning_rate=1e-3",
    "training.max_steps=4",
    "logging.save_interval=2",
    "reward.grpo.dit.method=nft",
    "reward.grpo.dit.old_decay=0.5",
    "training.ema.decay=0.5",
]
SHORT = ["training.max_steps=2", "logging.save_interval=1", "training.optimizer=adamw", "training.adam_epsilon=1e-4"]
RATE = "training.learning_rate=1e-3"
KINDS = {
    "adapters-alone": [
        *SHORT,
        RATE,
        "lora.enabled=true",
        "lora.rank=2",
        "checkpoint.save_lora_only=true",
        "checkpoint.save_optimizer=false",
    ],
    "schedule-free": [*SHORT, "training.optimizer=adamw_schedule_free", "training.adam_beta1=0.9", RATE],
    "moving-reference": [
        *SHORT,
        RATE,
        "reward.grpo.reference=ema",
        "reward.grpo.reference_decay=0.5",
        "reward.grpo.kl_coef=1.0",
        "reward.grpo.updates_per_rollout=2",
    ],
}
"""Runs of two steps that keep or write other weights than most."""
LORA = ["lora.enabled=true", "lora.rank=2", "lora.alpha=4", "model.torch_dtype=bfloat16"]


def after_five_steps(settings: ResolvedOptimizer, network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `network`, whole, after updates by gradients that are the same for every network."""
    optimizer = build_optimizer(settings, dict(network.named_parameters()), {})
    inputs = torch.Generator().manual_seed(1)
    for _ in range(5):
        network(torch.randn(4, 6, generator=inputs)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
        for name, value in network.named_parameters()
    }


def update_rules(folder: Path, world: World) -> None:
    """By rule the largest difference between weights in shards and whole ones, and how far these have moved; or why
    there is none. Nine rows do not divide by two."""
    usual = config_of(folder, "model.component=ar").optimizer_for("ar")
    told: dict[str, tuple[float, float] | str] = {}
    for rule in RULES:
        network = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        with torch.no_grad():
            for place, parameter in enumerate(network.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)))
        start = {name: value.detach().clone() for name, value in network.named_parameters()}
        settings = replace(usual, name=rule, learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1)
        sharded = copy.deepcopy(network)
        fully_shard(sharded)
        whole = after_five_steps(settings, network)
        try:
            found = after_five_steps(settings, sharded)
        except RuntimeError as error:
            told[rule] = str(error)
            continue
        off = max((found[name] - value).abs().max().item() for name, value in whole.items())
        told[rule] = off, max((start[name] - value).abs().max().item() for name, value in whole.items())
    torch.save(told, folder / f"rules-{world.rank}.pt")


def saved_and_continued(folder: Path, world: World) -> None:
    """Four steps; and two, from a checkpoint of its own and from that of one process."""
    trainer_of(folder, *SHARDED, *ADAM, f"output_dir={folder}/shards", world=world).train()
    for name, origin in {"again": "shards", "from-alone": "alone"}.items():
        resume = f"checkpoint.resume_from={folder}/{origin}/checkpoints/step-000002"
        accepted = "resume.accept=[training.batch_size]"
        trainer_of(folder, *SHARDED, *ADAM, resume, accepted, f"output_dir={folder}/{name}", world=world).train()
    for name, keys in KINDS.items():
        trainer_of(folder, *SHARDED, *keys, f"output_dir={folder}/{name}", world=world).train()
    for strategy in ("fsdp", "ddp"):  # of two processes each: in bf16 rows are rounded as those beside them have it
        own = [f"distributed.strategy={strategy}", "training.max_steps=2", f"output_dir={folder}/adapters-{strategy}"]
        trainer_of(folder, *SHARDED, *ADAM, *LORA, *own, world=world).train()


if __name__ == "__main__":
    given, world = Path(sys.argv[1]), init_world(True, "gloo")
    update_rules(given, world)
    saved_and_continued(given, world)
    shutdown(world)
