"""From a configuration to a model family, and the few things that families do differently for their trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from glm_training.config import Config
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.sampling import step_hooks
from glm_training.models.lora import add_lora
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.types import UNetCondition, add_time_ids
from glm_training.utils.distributed import World
from glm_training.utils.randomness import uniform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Condition = DiTCondition | UNetCondition
"""What the diffusion half of a family is conditioned on."""


def build_family(config: Config, world: World) -> Family:
    """Loads the model, adds adapters where asked, and leaves exactly the trained parameters with gradients, in fp32.

    Optimizers need fp32: a step of 1e-5 is lost in bf16 weights. The other weights stay in `model.torch_dtype`.
    """
    family = _load(config, world)
    for part in config.parts():
        lora = config.lora_for(part)
        if lora.enabled:
            add_lora(family.module(part), lora.targets, lora.rank, lora.alpha, lora.dropout, seed=config.seed)
    family.set_trainable(**dict.fromkeys(config.parts(), True))
    for part in config.parts():
        for parameter in family.trainable(part).values():
            parameter.data = parameter.data.float()
        if config.training.gradient_checkpointing:
            family.component(part).enable_gradient_checkpointing()
    return family


def _load(config: Config, world: World) -> Family:
    settings, dtype = config.model, DTYPES[config.model.torch_dtype]
    if settings.family == "sdxl":
        return SDXL.load(
            settings.name,
            dtype=dtype,
            device=world.device,
            revision=settings.revision,
            local_files_only=settings.local_files_only,
            seed=config.seed,
            taesd=settings.taesd,
        )
    return GLMImage.load(
        settings.name,
        dtype=dtype,
        device=world.device,
        revision=settings.revision,
        local_files_only=settings.local_files_only,
        seed=config.seed,
    )


def evaluation_sampling(config: Config) -> Sampling:
    """How held-out images are drawn."""
    return Sampling(**asdict(config.evaluation_sampling()))


@torch.no_grad()
def draw_condition(
    config: Config,
    family: Family,
    prompts: Sequence[str],
    positions: Sequence[int],
    on_step: Callable[[], None] | None = None,
) -> Condition:
    """What the diffusion half is conditioned on for B prompts, whose places in the run's sequence of samples are
    `positions`: GLM-Image's AR half writes a plan for each, SDXL's encoders read it, for an uncropped image."""
    height, width = config.data.image_size.height, config.data.image_size.width
    if isinstance(family, SDXL):
        component = family.unet
        ids = add_time_ids((height, width), (0, 0), (height, width), rows=len(prompts)).to(component.device)
        return UNetCondition(component.encode_prompts(prompts), ids)
    assert isinstance(family, GLMImage)
    settings = config.rollout_sampling()
    prompt = family.ar.encode_prompts(list(prompts), height, width)
    names = [(position, 0) for position in positions]
    draws = uniform(config.seed, "condition/tokens", names, (prompt.T,), device=family.ar.device)
    rollout = family.ar.rollout(
        prompt,
        1,
        draws,
        temperature=settings.temperature,
        top_p=settings.top_p,
        do_sample=settings.do_sample,
        micro_batch_size=config.rollout.micro_batch_size,
        on_step=step_hooks(on_step)[0],
    )
    return family.dit.condition(prompts, rollout.large_tokens, prompt.large_grid)
