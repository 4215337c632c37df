"""The phases of a run, and what is said when memory or numbers give out in one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, Literal

import torch

from glm_training.config import Config
from glm_training.engine.errors import DeviceMemoryError, NonFiniteError
from glm_training.utils.distributed import World
from glm_training.utils.words import counted

Phase = Literal[
    "loading",
    "rollout",
    "reward",
    "AR update",
    "DiT update",
    "supervised step",
    "encoding",
    "preference step",
    "distillation step",
    "VGT step",
    "evaluation",
    "saving",
]

SAMPLING = ("rollout.micro_batch_size", "rollout.vae_batch_size")
UPDATE = (
    "rollout.micro_batch_size",
    "training.gradient_checkpointing",
    "lora.enabled",
    "model.quantization",
    "training.optimizer",
)
OFFLOAD = "training.offload_between_phases"
BATCH = ("training.batch_size", "reward.grpo.num_samples")
SIZE = ("data.image_size.height", "data.image_size.width")
REMEDIES: dict[Phase, tuple[str, ...]] = {
    "loading": ("model.torch_dtype", "lora.enabled", "model.quantization", "training.optimizer"),
    "rollout": (*SAMPLING, OFFLOAD, *BATCH, "training.gradient_accumulation_steps", *SIZE),
    "reward": (*BATCH, *SIZE),
    "AR update": (OFFLOAD, *UPDATE, *BATCH, *SIZE),
    "DiT update": (OFFLOAD, *UPDATE, *BATCH, *SIZE),
    "supervised step": ("training.batch_size", *UPDATE[1:], *SIZE),
    "encoding": SIZE,
    "preference step": ("training.batch_size", *UPDATE[1:], *SIZE),
    "distillation step": ("training.batch_size", *UPDATE[1:], "dmdr.guidance_rank", *SIZE),
    "VGT step": ("training.batch_size", "training.gradient_checkpointing", "training.optimizer", *SIZE),
    "evaluation": (*SAMPLING[::-1], "evaluation.samples_per_prompt", "evaluation.guidance_scale", *SIZE),
    "saving": ("checkpoint.save_lora_only",),
}
"""Keys that lower the memory of each phase, those first that leave the results as they are."""

ADVICE = {
    "rollout.micro_batch_size": "fewer samples per forward pass; the results stay the same",
    "rollout.vae_batch_size": "fewer images decoded at once; the results stay the same",
    "dmdr.guidance_rank": "smaller adapters of the guidance network",
    "training.gradient_checkpointing": "true: activations are recomputed, not kept",
    OFFLOAD: "true, in a run of one process: what a phase does not use waits on the CPU; the results stay the same",
    "training.batch_size": "fewer prompts at once, with more training.gradient_accumulation_steps",
    "training.gradient_accumulation_steps": "fewer rollouts held until the update",
    "training.optimizer": "adamw_8bit: smaller optimizer state",
    "reward.grpo.num_samples": "fewer images per prompt",
    "lora.enabled": "true: adapters have small gradients and optimizer state",
    "model.torch_dtype": "bfloat16: half the size of float32",
    "model.quantization": "nf4, with LoRA: the frozen weights in 4 bits",
    "evaluation.samples_per_prompt": "fewer images per prompt",
    "evaluation.guidance_scale": "1 switches guidance off, which holds two velocities",
    "checkpoint.save_lora_only": "true, with LoRA: no merged copy of the weights",
    "data.image_size.height": "smaller images",
    "data.image_size.width": "smaller images",
}
SPENT: dict[str, tuple[Any, ...]] = {
    "rollout.micro_batch_size": (1,),
    "rollout.vae_batch_size": (1,),
    "training.gradient_checkpointing": (True,),
    OFFLOAD: (True,),
    "training.batch_size": (1,),
    "training.gradient_accumulation_steps": (1,),
    "training.optimizer": ("adamw_8bit", "sgd"),
    "lora.enabled": (True,),
    "model.torch_dtype": ("bfloat16", "float16"),
    "model.quantization": ("nf4",),
    "evaluation.samples_per_prompt": (1,),
    "evaluation.guidance_scale": (1,),
    "checkpoint.save_lora_only": (True,),
}
"""Values at which a key has nothing left to give."""


@contextmanager
def guarded(phase: Phase, config: Config, world: World, step: int) -> Iterator[None]:
    """Inside, a device out of memory and values that are not finite become errors that name the phase and the remedy.

    `step` counts the finished steps. Raises DeviceMemoryError and NonFiniteError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(_out_of_memory(phase, config, world, step)) from error
    except FloatingPointError as error:
        raise NonFiniteError(f"{phase}: {error}", step) from error


def _out_of_memory(phase: Phase, config: Config, world: World, step: int) -> str:
    figures = ""
    if world.device.type == "cuda":
        peak, size = torch.cuda.max_memory_allocated(world.device), torch.cuda.mem_get_info(world.device)[1]
        figures = f" (peak of this process: {peak / 2**30:.1f} of {size / 2**30:.1f} GiB)"
    lines = [
        f"the device {world.device} is out of memory{figures}. Phase: {phase}, after {counted(step, 'finished step')}."
    ]
    remedies = _remedies(phase, config)
    if remedies:
        lines += ["Change, in this order:", *(f"  {line}" for line in remedies)]
        lines.append(
            "To go on from a checkpoint, those that matter to the training must be listed under resume.accept."
        )
    else:
        lines.append("No key is left that would lower it: take a larger device, or more of them.")
    return "\n".join(lines)


def _remedies(phase: Phase, config: Config) -> list[str]:
    """`key (now value): what to do`, for each key of the phase that has something left to give."""
    lines = []
    for key in REMEDIES[phase]:
        value: Any = reduce(getattr, key.split("."), config)
        if value not in SPENT.get(key, ()):
            lines.append(f"{key} (now {'null' if value is None else value}): {ADVICE[key]}")
    return lines
