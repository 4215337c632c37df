"""Two of these are the run of test_gathering: halves in shards that draw block by block, beside whole ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm_training.engine.families import build_family
from glm_training.models.family import Family
from glm_training.models.gathering import OtherFailed
from glm_training.utils.distributed import World, barrier, init_world, shutdown
from tests.runs import config_of, trainer_of, weights_of

BLOCKS = ["distributed.strategy=fsdp", "distributed.gather=block"]
RUN = [
    "training.batch_size=1",
    "training.max_steps=2",
    "evaluation.enabled=true",
    "evaluation.num_eval_samples=3",
    "logging.eval_interval=1",
    "distributed.strategy=fsdp",
]
SIZES = {0: (64, 96), 1: (32, 64)}
"""Height and width of what each process draws: 6 and 2 tokens in a large grid."""


BROKEN = {"between passes": (1, None), "in the first block": (1, 0), "in the last block": (0, -1)}
"""The process that breaks off, and the block in which it does."""


class GivenUp(Exception):
    """Raised where a process is to break off."""


def layers(family: Family) -> dict[str, list[nn.Module]]:
    return {
        "ar": list(family.ar.model.model.language_model.layers),
        "dit": list(family.dit.transformer.transformer_blocks),
    }


def whole_blocks(family: Family, half: str) -> int:
    """How many blocks of a half lie there whole."""
    return sum(not any(isinstance(p, DTensor) for p in block.parameters()) for block in layers(family)[half])


def plans(family: Family, rank: int, on_step: Any = None) -> dict[str, Tensor]:
    """Plans of as many prompts as the rank's number and one, one prompt after the other."""
    prompts = ["a red circle", 'a sign that says "hi"'][: rank + 1]
    prompt = family.ar.encode_prompts(prompts, *SIZES[rank])
    uniforms = torch.rand(2 * len(prompts), prompt.T, generator=torch.Generator().manual_seed(rank))
    rollout = family.ar.rollout(prompt, 2, uniforms, temperature=0.9, top_p=0.75, micro_batch_size=2, on_step=on_step)
    return {"tokens": rollout.tokens, "log_probs": rollout.log_probs}


def renders(family: Family, rank: int, on_step: Any = None) -> dict[str, Tensor]:
    """Three or six guided steps, the second process's from a source."""
    height, width = SIZES[rank]
    tokens = torch.arange(height * width // 1024)[None]
    source = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(7)) if rank else None
    grid = (height // 32, width // 32)
    condition = family.dit.condition(['"hi"'], tokens, grid, source, tokens if rank else None)
    noise = torch.randn(1, *family.dit.latent_shape(height, width), generator=torch.Generator().manual_seed(rank))
    schedule = family.dit.schedule(3 * (rank + 1), height, width)
    drawn = family.dit.sample(noise, condition, schedule, guidance_scale=2.0, on_step=on_step)
    return {"latents": drawn.final}


@contextmanager
def broken(block: nn.Module) -> Iterator[None]:
    """Inside, the second half of a block fails."""

    def fail(*_: Any) -> None:
        raise GivenUp

    hook = next(child for name, child in block.named_modules() if name in ("mlp", "ff")).register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def compared(folder: Path, world: World) -> dict[str, dict[str, dict[str, Tensor]]]:
    """What each process draws in shards, with the blocks that lay whole before each step, and from a whole model; and
    how both end when one breaks off, and what they draw after all that."""
    keys = ["training.batch_size=1", f"output_dir={folder}/none"]
    sharded = trainer_of(folder, *BLOCKS, *keys, world=world).family
    alone = build_family(config_of(folder, *keys), World())
    seen: list[int] = []

    def give_up(step: int) -> None:
        if step == 1:
            raise GivenUp

    found = {}
    for half, draw in {"ar": plans, "dit": renders}.items():
        found[half] = {
            "shards": draw(sharded, world.rank, lambda step, half=half: seen.append(whole_blocks(sharded, half))),
            "whole": draw(alone, world.rank),
        }
        for how, (breaks, block) in BROKEN.items():
            try:
                if block is None or world.rank != breaks:
                    found[half][how] = draw(sharded, world.rank, give_up if world.rank == breaks else None)
                else:
                    with broken(layers(sharded)[half][block]):
                        draw(sharded, world.rank)
            except (GivenUp, OtherFailed) as error:
                ended = {"gave up": isinstance(error, GivenUp), "whole blocks": whole_blocks(sharded, half)}
                found[half][how] = {name: torch.tensor(value) for name, value in ended.items()}
        found[half]["again"] = draw(sharded, world.rank)
        found[half]["after"] = {"whole blocks": torch.tensor([whole_blocks(sharded, half), *seen])}
        seen.clear()
        barrier(world)
    return found


if __name__ == "__main__":
    given, world = Path(sys.argv[1]), init_world(True, "gloo")
    torch.save(compared(given, world), given / f"drawn-{world.rank}.pt")
    for gather in ("half", "block"):
        trainer = trainer_of(given, *RUN, f"distributed.gather={gather}", f"output_dir={given}/{gather}", world=world)
        trainer.train()
        torch.save({"weights": weights_of(trainer), "notes": trainer.notes}, given / f"{gather}-{world.rank}.pt")
    shutdown(world)
