"""From a configuration to a model family, and the few things that families do differently for their trainers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glm_training.config import Config
from glm_training.data import PromptReader
from glm_training.engine.errors import SettingsError
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image import loading as glm_loading
from glm_training.models.glm_image.conditioning import TOKEN_PIXELS
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.prompt_text import PromptReader as GLMPromptReader
from glm_training.models.loading import fetch_parts
from glm_training.models.lora import add_lora, check_targets
from glm_training.models.run_folders import pipeline_in
from glm_training.models.sdxl import loading as sdxl_loading
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.text import PromptReader as SDXLPromptReader
from glm_training.models.sdxl.types import UNetCondition, add_time_ids
from glm_training.models.weights import check_weights
from glm_training.utils.distributed import World
from glm_training.utils.randomness import uniform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Condition = DiTCondition | UNetCondition
"""What the diffusion half of a family is conditioned on."""


def build_family(config: Config, world: World) -> Family:
    """Loads the model, adds adapters where asked, and leaves exactly the trained parameters with gradients, in fp32.

    Optimizers need fp32: a step of 1e-5 is lost in bf16 weights. The other weights stay in `model.torch_dtype`.
    """
    family = load_family(config, world)
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


def evaluation_sampling(config: Config) -> Sampling:
    """How held-out images are drawn."""
    return Sampling(**asdict(config.evaluation_sampling()))


class Conditions(ABC):
    """What the diffusion half is conditioned on, for prompts of the training data."""

    def __init__(self, config: Config, family: Any) -> None:
        self.config = config
        self.family = family
        self.size = config.data.image_size.height, config.data.image_size.width

    @abstractmethod
    def of(self, prompts: Sequence[str], indices: Sequence[int], epochs: Sequence[int]) -> Condition:
        """For B prompts at places `indices` of the data, in the given `epochs` of the run."""


class TextConditions(Conditions):
    """SDXL's encoders read the prompt, for an uncropped image."""

    family: SDXL

    @torch.no_grad()
    def of(self, prompts: Sequence[str], indices: Sequence[int], epochs: Sequence[int]) -> UNetCondition:
        component = self.family.unet
        ids = add_time_ids(self.size, (0, 0), self.size, rows=len(prompts)).to(component.device)
        return UNetCondition(component.encode_prompts(prompts), ids)


class PlanConditions(Conditions):
    """GLM-Image's AR half writes plans for a prompt, which are kept: `dmdr.plans_per_prompt` different ones, taken in
    turn from epoch to epoch.

    Plan n of a prompt depends on its place in the data, n and the seed alone, so a resumed run writes the same ones
    again: in fp32; in half precision what is written beside it may tip a token.
    """

    family: GLMImage

    def __init__(self, config: Config, family: GLMImage) -> None:
        super().__init__(config, family)
        self._plans: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def of(self, prompts: Sequence[str], indices: Sequence[int], epochs: Sequence[int]) -> DiTCondition:
        count, dit = self.config.dmdr.plans_per_prompt, self.family.dit
        names = [(index, epoch % count) for index, epoch in zip(indices, epochs, strict=True)]
        missing = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in self._plans}
        if missing:
            self._write(list(missing.values()), list(missing))
        tokens = torch.stack([self._plans[name] for name in names]).long().to(dit.device)
        return dit.condition(prompts, tokens, (self.size[0] // TOKEN_PIXELS, self.size[1] // TOKEN_PIXELS))

    def _write(self, prompts: list[str], names: list[tuple[int, int]]) -> None:
        settings, ar = self.config.rollout_sampling(), self.family.ar
        prompt = ar.encode_prompts(prompts, *self.size)
        rollout = ar.rollout(
            prompt,
            1,
            uniform(self.config.seed, "condition/tokens", names, (prompt.T,), device=ar.device),
            temperature=settings.temperature,
            top_p=settings.top_p,
            do_sample=settings.do_sample,
            micro_batch_size=self.config.rollout.micro_batch_size,
        )
        for name, tokens in zip(names, rollout.large_tokens.to("cpu", torch.int32), strict=True):
            self._plans[name] = tokens.clone()


@dataclass(frozen=True)
class FamilyKit:
    """What trainers need of a family besides its own methods."""

    load: Callable[..., Family]
    conditions: Callable[[Config, Any], Conditions]
    prompt_reader: type[GLMPromptReader] | type[SDXLPromptReader]
    check_source: Callable[..., None]
    skeleton: Callable[[str, str, str | None], nn.Module | None]
    networks: Mapping[str, str]


FAMILIES = {
    "glm_image": FamilyKit(
        GLMImage.load,
        PlanConditions,
        GLMPromptReader,
        glm_loading.check_source,
        glm_loading.load_skeleton,
        glm_loading.NETWORKS,
    ),
    "sdxl": FamilyKit(
        SDXL.load,
        TextConditions,
        SDXLPromptReader,
        sdxl_loading.check_source,
        sdxl_loading.load_skeleton,
        sdxl_loading.NETWORKS,
    ),
}
"""By `model.family`. A family is added here, and to `preference.pair_families.ENCODERS` for preference tuning."""


def load_family(config: Config, world: World) -> Family:
    """The model as its files have it, on the device of this process."""
    settings = config.model
    return FAMILIES[settings.family].load(
        settings.name,
        dtype=DTYPES[settings.torch_dtype],
        device=world.device,
        revision=settings.revision,
        local_files_only=settings.local_files_only,
        seed=config.seed,
        **_decoder(config),
    )


def _decoder(config: Config) -> dict[str, str]:
    """The small decoder that is given apart from the model, which one family alone has."""
    return {} if config.model.taesd is None else {"taesd": config.model.taesd}


def prompt_reader(config: Config) -> PromptReader | None:
    """What tells how much of a prompt the model reads; None where its tokenizers are not on this machine.

    Raises ModelLoadError for files that cannot be read.
    """
    settings, size = config.model, config.data.image_size
    reader = FAMILIES[settings.family].prompt_reader.load(pipeline_in(settings.name), settings.revision)
    if reader is None:
        return None
    return partial(reader.read, height=size.height, width=size.width, mode=config.training.mode)


def fetch_small_files(config: Config) -> None:
    """Brings what `prompt_reader` and `check_model` need of a hub id into the local cache, a few MB of text.

    Raises ModelLoadError where the hub says that it cannot give the model; ModelNotHere where it cannot be asked.
    """
    settings, kit = config.model, FAMILIES[config.model.family]
    parts = dict.fromkeys([*kit.prompt_reader.parts, *(kit.networks[part] for part in config.parts())])
    fetch_parts(
        pipeline_in(settings.name),
        list(parts),
        revision=settings.revision,
        local_files_only=settings.local_files_only,
    )


def check_model(config: Config) -> list[str]:
    """What can be known of the model without its weights: that its files are there, that `lora.<part>_targets` name
    layers of it, and that `dmdr.initial_weights` fit. Returns what could not be looked at, a line each.

    Raises ModelLoadError or SettingsError.
    """
    settings, kit = config.model, FAMILIES[config.model.family]
    source = pipeline_in(settings.name)
    kit.check_source(source, **_decoder(config))
    distils = config.training.method == "dmdr"
    problems = []
    for part in config.parts():
        lora = config.lora_for(part)
        if not (lora.enabled or distils):
            continue
        skeleton = kit.skeleton(source, part, settings.revision)
        if skeleton is None:
            return [f"{settings.name} is not in the local cache: lora.{part}_targets are checked once it is loaded"]
        try:
            check_targets(skeleton, lora.targets)
        except ValueError as error:
            problems.append(f"lora.{part}_targets: {error}")
        if distils and config.dmdr.initial_weights is not None:
            try:
                check_weights(skeleton, config.dmdr.initial_weights)
            except (OSError, ValueError) as error:
                problems.append(f"dmdr.initial_weights: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return []


def build_conditions(config: Config, family: Family) -> Conditions:
    """The conditions of the family."""
    return FAMILIES[config.model.family].conditions(config, family)
