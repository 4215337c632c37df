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
from glm_training.config.checks.family import COMPONENTS
from glm_training.data import PromptReader
from glm_training.engine.encoding.encoder import FrozenEncoder, GLMEncoder, SDXLEncoder
from glm_training.engine.errors import SettingsError
from glm_training.engine.sharding import may_shard
from glm_training.models.adapters import StartingAdapter, merge_into, start_from, starting_adapters
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image import loading as glm_loading
from glm_training.models.glm_image.conditioning import TOKEN_PIXELS
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.prompt_text import PromptReader as GLMPromptReader
from glm_training.models.loading import fetch_parts
from glm_training.models.lora import add_lora, check_targets
from glm_training.models.quantization import Kind, quantise_layers
from glm_training.models.run_folders import pipeline_in
from glm_training.models.sdxl import loading as sdxl_loading
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.text import PromptReader as SDXLPromptReader
from glm_training.models.sdxl.types import UNetCondition, add_time_ids
from glm_training.models.vgt import loading as vgt_loading
from glm_training.models.vgt.family import VGT
from glm_training.models.weights import check_weights, in_fp32
from glm_training.utils.distributed import World
from glm_training.utils.hub_files import Choose, Exactly, HubFiles, PipelineParts, hub_id, model_folder
from glm_training.utils.randomness import uniform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

Condition = DiTCondition | UNetCondition
"""What the diffusion half of a family is conditioned on."""


def build_family(config: Config, world: World) -> Family:
    """Loads the model, adds adapters where asked, and leaves exactly the trained parameters with gradients.

    Weights are in `model.torch_dtype`, but for adapters and what others were merged into: `build_parts` takes what is
    trained to fp32, in shards block by block.
    """
    kind = config.model.quantization
    # few bits are made of full ones on the CPU, layer by layer: the device never holds the network in full
    family = load_family(config, world, device=None if kind == "none" else torch.device("cpu"))
    whole = {part: not config.lora_for(part).enabled for part in config.parts()}
    family.set_trainable(**whole)
    merged = adapters_to_merge(config)
    for part in whole if merged else ():
        in_fp32(family.trainable(part).values())  # half precision would round what is merged
    merge_into(family, merged)
    if kind != "none":
        for part in config.parts():
            _quantise(family, part, kind, compute_dtype(config), world.device)
        family.to(world.device)
    begun = {each.part: each for each in adapters_to_train_on(config)}
    for part in config.parts():
        lora = config.lora_for(part)
        if lora.enabled:
            add_lora(family.module(part), lora.targets, lora.rank, lora.alpha, lora.dropout, seed=config.seed)
            if part in begun:
                start_from(family.module(part), begun[part])
    family.set_trainable(**dict.fromkeys(config.parts(), True))
    if config.training.gradient_checkpointing:
        for part in config.parts():
            family.component(part).enable_gradient_checkpointing()
    if config.training.compile:
        for part in config.parts():
            compile_blocks(family.sharding_units(part))
    return family


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """`torch.compile` of each block in place: names, adapters and what is saved stay as they are. Blocks of one class
    share what is compiled. A decode loop that calls parts of them (`glm_image.decode`) is as before."""
    for block in blocks:
        block.compile(backend=backend)


def _quantise(family: Family, part: str, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    quantise_layers(family.module(part), family.sharding_units(part), kind, dtype, device)


def compute_dtype(config: Config) -> torch.dtype:
    """What the products of the trained halves are computed in: autocast's type, or else that of the weights."""
    return AUTOCAST.get(config.training.mixed_precision, DTYPES[config.model.torch_dtype])


def adapters_to_merge(config: Config) -> list[StartingAdapter]:
    """Those of `model.adapters`, for any component of the family. Raises ModelLoadError."""
    components = [part for part in COMPONENTS[config.model.family] if part != "both"]
    return starting_adapters("model.adapters", config.model.adapters, components)


def adapters_to_train_on(config: Config) -> list[StartingAdapter]:
    """Those of `lora.start_from`, for the trained parts that have adapters. Raises ModelLoadError."""
    place, parts = config.lora.start_from, [part for part in config.parts() if config.lora_for(part).enabled]
    return [] if place is None else starting_adapters("lora.start_from", [place], parts)


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
    """What trainers need of a family besides its own methods.

    `options`: keywords that its `load` takes besides those of all. `check`: what can be known of `model.name` before
    weights are read; ModelLoadError. `fetch`: brings the small files that this needs of hub ids into the local cache.
    `files`: all that its loaders take from the hub. `skeleton`: a component without weights, for a family with
    adapters; `conditions`: for one that is distilled; `encoder`: for one whose encoders may run ahead of training.
    """

    load: Callable[..., Family]
    options: Callable[[Config], dict[str, Any]]
    prompt_reader: type[GLMPromptReader] | type[SDXLPromptReader] | type[vgt_loading.PromptReader]
    check: Callable[[str, Config], None]
    fetch: Callable[[str, Config], None]
    files: Callable[[str, Config], dict[str, tuple[str | None, Choose]]]
    skeleton: Callable[[str, str, str | None], nn.Module | None] | None = None
    conditions: Callable[[Config, Any], Conditions] | None = None
    encoder: Callable[[Config, Any], FrozenEncoder] | None = None


def _fetch_pipeline(
    reader: type[GLMPromptReader] | type[SDXLPromptReader], networks: Mapping[str, str], name: str, config: Config
) -> None:
    parts = dict.fromkeys([*reader.parts, *(networks[part] for part in config.parts())])
    settings = config.model
    fetch_parts(name, list(parts), revision=settings.revision, local_files_only=settings.local_files_only)


def _decoder(config: Config) -> dict[str, str]:
    """The small decoder that is given apart from the model."""
    return {} if config.model.taesd is None else {"taesd": config.model.taesd}


def _pipeline(parts: Sequence[str], config: Config, *, variants: bool) -> Choose:
    return PipelineParts(tuple(parts), variants and config.model.torch_dtype != "float32")


def vgt_source(config: Config) -> vgt_loading.Source:
    """What is to be made of `model.name`, for VGT."""
    vgt = config.vgt
    return vgt_loading.Source(
        component=config.model.component,
        size=(config.data.image_size.height, config.data.image_size.width),
        autoencoder=vgt.autoencoder,
        decoder=vgt.decoder,
        channel_norm=vgt.channel_norm,
        kl=vgt.kl,
        repa=vgt.repa.model,
        order=vgt.order,
        distils=vgt.distillation_weight > 0,
    )


def _vgt_places(name: str, config: Config) -> dict[str, str | None]:
    """What VGT's models are made of, by key; a decoder for an autoencoder that is new."""
    if config.model.component == "autoencoder":
        return {"model.name": name, "vgt.decoder": config.vgt.decoder if hub_id(name) is not None else None}
    return {"model.name": name, "vgt.repa.model": config.vgt.repa.model}


def _vgt_hub(config: Config) -> vgt_loading.Hub:
    return vgt_loading.Hub(config.model.revision, config.model.local_files_only)


FAMILIES = {
    "glm_image": FamilyKit(
        GLMImage.load,
        lambda config: {"cuda_graph": config.rollout.cuda_graph},
        GLMPromptReader,
        lambda name, config: glm_loading.check_source(name),
        partial(_fetch_pipeline, GLMPromptReader, glm_loading.NETWORKS),
        lambda name, config: {"model.name": (name, _pipeline(glm_loading.KIND.parts, config, variants=False))},
        glm_loading.load_skeleton,
        PlanConditions,
        GLMEncoder,
    ),
    "sdxl": FamilyKit(
        SDXL.load,
        _decoder,
        SDXLPromptReader,
        lambda name, config: sdxl_loading.check_source(name, config.model.taesd),
        partial(_fetch_pipeline, SDXLPromptReader, sdxl_loading.NETWORKS),
        lambda name, config: {
            "model.name": (name, _pipeline(sdxl_loading.KIND.parts, config, variants=True)),
            "model.taesd": (config.model.taesd, Exactly(("config.json", "diffusion_pytorch_model.safetensors"))),
        },
        sdxl_loading.load_skeleton,
        TextConditions,
        SDXLEncoder,
    ),
    "vgt": FamilyKit(
        VGT.load,
        lambda config: {"source": vgt_source(config), "encoder_rate_ratio": config.vgt.encoder_rate_ratio},
        vgt_loading.PromptReader,
        lambda name, config: vgt_loading.check_source(name, vgt_source(config)),
        lambda name, config: vgt_loading.fetch_small_files(name, vgt_source(config), hub=_vgt_hub(config)),
        lambda name, config: {key: (place, model_folder) for key, place in _vgt_places(name, config).items()},
    ),
}
"""By `model.family`. A family is added here, and to `preference.pair_families.PAIRS` for preference tuning."""


def load_family(config: Config, world: World, name: str | None = None, device: torch.device | None = None) -> Family:
    """The model, or another one of its family called `name`, as its files have it, on `device`, or that of this
    process."""
    settings, kit = config.model, FAMILIES[config.model.family]
    return kit.load(
        name or settings.name,
        dtype=DTYPES[settings.torch_dtype],
        # what may be cut into shards is cut on its way to the device
        device=device or (torch.device("cpu") if may_shard(config, world) else world.device),
        revision=settings.revision,
        local_files_only=settings.local_files_only,
        seed=config.seed,
        **kit.options(config),
    )


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
    FAMILIES[config.model.family].fetch(pipeline_in(config.model.name), config)


def model_files(config: Config) -> list[HubFiles]:
    """What the loaders of the model take from the hub, by the key that names it."""
    settings = config.model
    places = FAMILIES[settings.family].files(pipeline_in(settings.name), config)
    return [
        HubFiles(key, repository, choose, settings.revision if key == "model.name" else None)
        for key, (name, choose) in places.items()
        if name is not None and (repository := hub_id(name)) is not None
    ]


def check_model(config: Config) -> list[str]:
    """What can be known of the model without its weights: that its files are there, that `lora.<part>_targets` name
    layers of it, and that `dmdr.initial_weights` fit. Returns what could not be looked at, a line each.

    Raises ModelLoadError or SettingsError.
    """
    settings, kit = config.model, FAMILIES[config.model.family]
    source = pipeline_in(settings.name)
    kit.check(source, config)
    distils = config.training.method == "dmdr"
    problems = []
    for part in config.parts():
        lora = config.lora_for(part)
        if not (lora.enabled or distils):
            continue
        skeleton = None if kit.skeleton is None else kit.skeleton(source, part, settings.revision)
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


def build_encoder(config: Config, family: Family) -> FrozenEncoder:
    """What looks at the family's pictures and texts."""
    encoder = FAMILIES[config.model.family].encoder
    if encoder is None:
        raise SettingsError(f"model.family {config.model.family} encodes nothing ahead")
    return encoder(config, family)


def build_conditions(config: Config, family: Family) -> Conditions:
    """The conditions of the family."""
    conditions = FAMILIES[config.model.family].conditions
    if conditions is None:
        raise SettingsError(f"model.family {config.model.family} cannot be distilled")
    return conditions(config, family)
