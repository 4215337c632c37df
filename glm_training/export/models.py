"""The models behind an export: the one that a run started from, and the one under training with a checkpoint's weights.

The latter is made of the states of the checkpoint, not of the `pipeline` in it: it is what an export is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from glm_training.config import Config
from glm_training.engine.families import DTYPES, FAMILIES, adapters_to_merge, load_family
from glm_training.export.source import Adapter, ExportError, Kind, Source
from glm_training.models.adapters import StartingAdapter, merge_into
from glm_training.models.family import Family, FewSteps
from glm_training.models.loading import ModelLoadError, parts_at_hand
from glm_training.models.lora import adapter_parameters, add_lora
from glm_training.models.run_folders import PIPELINE, pipeline_in
from glm_training.models.weights import cast_weights
from glm_training.utils.distributed import World
from glm_training.utils.downloads import sha256_of

CPU = World()

PARTS = {"ar": "vision_language_encoder", "dit": "transformer"}
"""Folder of a pipeline in which a part lies, where it is called otherwise."""


def based(config: Config, base: str) -> Config:
    """The configuration with `base` as the model, in full, which need not be what the run named."""
    own = {"name": base, "quantization": "none", "local_files_only": True}
    if base != config.model.name:
        own["revision"] = None
    return config.model_copy(update={"model": config.model.model_copy(update=own)})


def base_model(source: Source, dtype: torch.dtype) -> Family:
    """The model that a run started from, with `model.adapters` merged, on the CPU in `dtype` (those are added in the
    run's own, as it did). Nothing is fetched. Raises ModelLoadError, in the words of this command."""
    config = based(source.config, source.base)
    try:
        merged = adapters_to_merge(config)
        _require_same(source, merged)
        family = load_family(config, CPU, device=torch.device("cpu"))
        if merged and DTYPES[config.model.torch_dtype] != torch.promote_types(DTYPES[config.model.torch_dtype], dtype):
            cast(family, dtype)  # to a wider one
        merge_into(family, merged)
    except ModelLoadError as error:
        told = str(error).replace("model.local_files_only is set", "an export fetches nothing")
        raise ModelLoadError(
            f"the adapters' model: {told}\nWhat to do: name a folder or a hub id that is in the local cache with --base"
        ) from error
    return cast(family, dtype)


def _require_same(source: Source, merged: Sequence[StartingAdapter]) -> None:
    """Raises ModelLoadError where adapters that the run merged first are others by now, as those of a run that went
    on."""
    known = source.manifest.metadata.get("data", {})
    for each in merged:
        if known.get(f"{each.key} {each.folder}") != sha256_of(each.file):
            raise ModelLoadError(f"the run merged other adapters (model.adapters) than lie in {each.folder} now")


def whole_model(source: Source, dtype: torch.dtype) -> Family:
    """The pipeline in a checkpoint, on the CPU in `dtype`. Raises ExportError and ModelLoadError."""
    if source.pipeline is None:
        raise ExportError(f"{source.folder} has no {PIPELINE}")
    source.verify(*(name for name in source.manifest.files if name.startswith(f"{PIPELINE}/")))
    family: Family = FAMILIES[source.family].load(str(source.pipeline), dtype=dtype)
    return family


def around_parts(source: Source) -> Family:
    """The model in fp32 that the trained parts alone are put into: the checkpoint's own, or the one that the run began
    with. Raises ExportError and ModelLoadError."""
    if source.pipeline is not None and not source.on_another_base:
        return whole_model(source, torch.float32)
    family = base_model(source, torch.float32)
    few_steps_of(source, family)
    return family


def few_steps_of(source: Source, family: Family) -> None:
    """Has a distilled student drawn as such."""
    dmdr = source.config.dmdr
    if source.config.training.method == "dmdr":
        family.draw_in_few_steps(FewSteps(dmdr.student_steps, dmdr.one_step_timestep))


def trainers_model(source: Source, kind: Kind, dtype: torch.dtype, *, adapters_alone: bool = False) -> Family:
    """The model under training with the weights `kind` of a checkpoint, its adapters beside the layers, on the CPU.
    What was trained whole is in fp32, the rest in `dtype`, adapters in fp32. With `adapters_alone` a half that was
    trained whole beside one with adapters is as the run began. Raises ExportError and ModelLoadError."""
    config = source.config
    if source.adapted:
        family = base_model(source, dtype)
        few_steps_of(source, family)
    else:
        family = whole_model(source, dtype)
    for part in source.adapted:
        add_adapter(family.module(part), source.adapter(part, kind))
    if adapters_alone:
        return family.eval()
    family.set_trainable(**dict.fromkeys(config.parts(), True))
    if kind == "shown" and source.whole and source.adapted:
        raise ExportError("a half trained whole beside one with adapters, by an optimizer with an average of its own")
    for part in source.whole if kind != "shown" else ():
        put(family, part, source.state(part, kind))
    return family.eval()


@torch.no_grad()
def put(family: Family, part: str, weights: dict[str, torch.Tensor]) -> None:
    """Gives the trained parameters of a part their weights, in fp32. Raises ExportError where they do not fit."""
    parameters = family.trainable(part)
    if parameters.keys() != weights.keys():
        raise ExportError(
            f"the {part} of the checkpoint does not fit the model: {len(parameters.keys() ^ weights.keys())} names "
            "differ. Name the model that the run started from with --base"
        )
    for name, parameter in parameters.items():
        parameter.data = weights[name].float()


@torch.no_grad()
def add_adapter(module: nn.Module, adapter: Adapter) -> None:
    """Puts an adapter beside the layers of a module that carries none. Raises ExportError where it does not fit."""
    layers = list(adapter.layers())
    try:
        add_lora(module, layers, adapter.rank, adapter.alpha)
    except ValueError as error:
        raise ExportError(f"the adapter of the {adapter.part} does not fit the model: {error}") from error
    for name, parameter in adapter_parameters(module).items():
        value = adapter.weights[name.replace(".default.", ".")]
        if value.shape != parameter.shape:
            raise ExportError(f"the adapter of the {adapter.part} does not fit the model, first at {name}")
        parameter.copy_(value)


def merged_model(source: Source, kind: Kind, dtype: torch.dtype | None) -> Family:
    """The model with the adapters of a checkpoint merged, in `dtype` or as the run has it; what was trained whole is
    as `trainers_model` has it. One rounding. Raises ExportError and ModelLoadError."""
    own = DTYPES[source.config.model.torch_dtype]
    family = base_model(source, torch.promote_types(own, dtype or own))
    for part in source.adapted:
        merge_adapter(family.module(part), source.adapter(part, kind))
    family.set_trainable(**dict.fromkeys(source.whole, True))
    for part in source.whole:
        put(family, part, source.state(part, kind))
    few_steps_of(source, family)
    return family if dtype is None else cast(family, dtype)


@torch.no_grad()
def merge_adapter(module: nn.Module, adapter: Adapter) -> None:
    """Adds alpha / rank B A to the weights of a module, in fp32, with one rounding. Raises ExportError where it does
    not fit."""
    for layer, (a, b) in adapter.layers().items():
        try:
            weight = module.get_parameter(f"{layer}.weight")
            weight.data.copy_(weight.float() + adapter.scale * (b.float() @ a.float()))
        except (AttributeError, RuntimeError) as error:
            raise ExportError(f"the adapter of the {adapter.part} does not fit the model: {error}") from error


def cast(family: Family, dtype: torch.dtype) -> Family:
    """The whole model in one dtype."""
    for name in family.components:
        cast_weights(family.component(name), dtype)
    return family


def folder_of(part: str) -> str:
    """The folder of a pipeline in which a part lies."""
    return PARTS.get(part, part)


def base_folder(config: Config, base: str) -> Path | None:
    """Where the base model is on this machine; None for one in memory, or not here."""
    if base in ("tiny", "tiny-random"):
        return None
    return parts_at_hand(pipeline_in(base), (), None if base != config.model.name else config.model.revision)


def skeleton_of(config: Config, base: str, part: str) -> nn.Module | None:
    """A part of the base model without weights; None where its configuration is not here."""
    kit = FAMILIES[config.model.family]
    return None if kit.skeleton is None else kit.skeleton(pipeline_in(base), part, based(config, base).model.revision)
