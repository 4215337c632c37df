"""From a configuration to a model family, and the few things that families do differently for their trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image.conditioning import TOKEN_PIXELS
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.family import GLMImage
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


class Conditions:
    """What the diffusion half is conditioned on, for prompts of the training data.

    SDXL's encoders read the prompt, for an uncropped image. GLM-Image's AR half writes plans for it, which are kept:
    `dmdr.plans_per_prompt` different ones, taken in turn from epoch to epoch. Plan n of a prompt depends on its place
    in the data, n and the seed alone, so a resumed run writes the same ones again: in fp32; in half precision what is
    written beside it may tip a token.
    """

    def __init__(self, config: Config, family: Family) -> None:
        self._config = config
        self._family = family
        self._size = config.data.image_size.height, config.data.image_size.width
        self._plans: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def of(self, prompts: Sequence[str], indices: Sequence[int], epochs: Sequence[int]) -> Condition:
        """For B prompts at places `indices` of the data, in the given `epochs` of the run."""
        family = self._family
        if isinstance(family, SDXL):
            component, size = family.unet, self._size
            ids = add_time_ids(size, (0, 0), size, rows=len(prompts)).to(component.device)
            return UNetCondition(component.encode_prompts(prompts), ids)
        assert isinstance(family, GLMImage)
        count = self._config.dmdr.plans_per_prompt
        names = [(index, epoch % count) for index, epoch in zip(indices, epochs, strict=True)]
        missing = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in self._plans}
        if missing:
            self._write(family, list(missing.values()), list(missing))
        tokens = torch.stack([self._plans[name] for name in names]).long().to(family.dit.device)
        return family.dit.condition(prompts, tokens, (self._size[0] // TOKEN_PIXELS, self._size[1] // TOKEN_PIXELS))

    def _write(self, family: GLMImage, prompts: list[str], names: list[tuple[int, int]]) -> None:
        settings = self._config.rollout_sampling()
        prompt = family.ar.encode_prompts(prompts, *self._size)
        rollout = family.ar.rollout(
            prompt,
            1,
            uniform(self._config.seed, "condition/tokens", names, (prompt.T,), device=family.ar.device),
            temperature=settings.temperature,
            top_p=settings.top_p,
            do_sample=settings.do_sample,
            micro_batch_size=self._config.rollout.micro_batch_size,
        )
        for name, tokens in zip(names, rollout.large_tokens.to("cpu", torch.int32), strict=True):
            self._plans[name] = tokens.clone()
