"""The teachers of on-policy distillation: frozen weights that stand in for the student's while they are asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from glm_training.checkpoint.state_tree import local_part, shard_like
from glm_training.config import Config
from glm_training.data import ImageDataset
from glm_training.data.text_lines import read_text
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import FAMILIES, load_family
from glm_training.methods.losses import Context
from glm_training.models.adapters import StartingAdapter, malformed, misfit, starting_adapters
from glm_training.models.family import Family
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import adapters_disabled, has_lora
from glm_training.models.run_folders import pipeline_in
from glm_training.models.snapshot import ParameterSnapshot
from glm_training.utils.distributed import World
from glm_training.utils.words import counted

Teachers = Mapping[str, Mapping[str, Context]]
"""By name and part: a context in which the part has the teacher's weights, without gradient."""


def key_of(name: str, of: str) -> str:
    """The key of a teacher's weights or prompts."""
    return f"opd.teachers.{name}.{of}"


def teacher_adapters(config: Config) -> dict[str, list[StartingAdapter]]:
    """Those of each teacher that has adapters, for the trained parts. ModelLoadError, with all that is wrong."""
    found, problems = {}, []
    for name, teacher in config.opd.teachers.items():
        if teacher.adapters is None:
            continue
        try:
            found[name] = starting_adapters(key_of(name, "adapters"), [teacher.adapters], config.parts())
        except ModelLoadError as error:
            problems.append(str(error))
    if problems:
        raise ModelLoadError("\n".join(problems))
    return found


def check_teachers(config: Config) -> None:
    """That the folders of the teachers hold what is asked of them. SettingsError, with all that is wrong."""
    problems, adapters = [], dict[str, list[StartingAdapter]]()
    try:
        adapters = teacher_adapters(config)
    except ModelLoadError as error:
        problems.append(str(error))
    skeleton, source = FAMILIES[config.model.family].skeleton, pipeline_in(config.model.name)
    for name, found in adapters.items():
        for each in found:
            module = None if skeleton is None else skeleton(source, each.part, config.model.revision)
            reason = malformed(each) if module is None else misfit(each, module)
            if reason is not None:
                problems.append(reason)
        missing = [part for part in config.parts() if part not in {each.part for each in found}]
        if missing:
            place = config.opd.teachers[name].adapters
            problems.append(
                f"{key_of(name, 'adapters')}: {place} has no adapter of the {' and '.join(missing)}, which learns from "
                "it: name one that has, or set model.component"
            )
    for name, teacher in config.opd.teachers.items():
        if teacher.model is None:
            continue
        try:
            folder = Path(pipeline_in(teacher.model, key_of(name, "model")))
        except ModelLoadError as error:
            problems.append(str(error))
            continue
        if not (folder / "model_index.json").is_file():
            problems.append(
                f"{key_of(name, 'model')}: {teacher.model} is no model: name a checkpoint with a pipeline, as "
                "runs/expert/checkpoints/step-000100"
            )
    if problems:
        raise SettingsError("\n".join(problems))


def routes(config: Config, dataset: ImageDataset) -> dict[str, str]:
    """Which teacher answers for each prompt of the data: the one in whose `prompts_file` it stands. SettingsError, with
    all that is wrong, for prompts of none and of several."""
    owners: dict[str, list[str]] = {}
    problems = []
    for name, teacher in config.opd.teachers.items():
        file = read_text(teacher.prompts_file)
        problems += [f"{key_of(name, 'prompts_file')}: {problem}" for problem in file.problems]
        for prompt in dict.fromkeys(line.text.strip() for line in file.lines if line.text and line.text.strip()):
            owners.setdefault(prompt, []).append(name)
    prompts = list(dict.fromkeys(dataset.prompts()))
    stray = [prompt for prompt in prompts if prompt.strip() not in owners]
    if stray and not problems:
        problems.append(
            f"prompts of the data that stand in no teacher's prompts_file: {len(stray)}, the first is "
            f"{stray[0]!r}. Add them to one under opd.teachers, or take them out of {config.dataset_file()}"
        )
    shared = [prompt for prompt in prompts if len(owners.get(prompt.strip(), ())) > 1]
    if shared:
        names = " and ".join(owners[shared[0].strip()])
        problems.append(
            f"prompts that stand in the prompts_file of several teachers: {len(shared)}, the first, {shared[0]!r}, in "
            f"those of {names}. Leave each to one"
        )
    if problems:
        raise SettingsError("\n".join(problems))
    return {prompt: owners[prompt.strip()][0] for prompt in prompts}


def build_teachers(config: Config, family: Family, world: World) -> Teachers:
    """Every teacher of every trained part; `family` has the weights that the run starts with.

    A teacher that is a whole model keeps a copy of what is trained and of what else differs from the student, one that
    is an adapter a copy of the layers that it changes, with the adapter in them. Raises SettingsError or
    ModelLoadError.
    """
    adapters = teacher_adapters(config)
    teachers: dict[str, dict[str, Context]] = {}
    for name, teacher in config.opd.teachers.items():
        teachers[name] = {}
        loaded = None
        if teacher.model is not None:
            loaded = load_family(config, world, pipeline_in(teacher.model, key_of(name, "model")))
        for part in config.parts():
            module = family.module(part)
            if loaded is not None:
                theirs = dict(loaded.module(part).named_parameters())
                values = _of_model(module, theirs, f"{key_of(name, 'model')}: {teacher.model}")
            else:
                values = _of_adapter(module, next(each for each in adapters[name] if each.part == part))
            teachers[name][part] = partial(_as_teacher, module, _snapshot(family.component(part), module, values))
    return teachers


@contextmanager
def _as_teacher(module: nn.Module, snapshot: ParameterSnapshot | None) -> Iterator[None]:
    plain: AbstractContextManager[None] = adapters_disabled(module) if has_lora(module) else nullcontext()
    with torch.no_grad(), plain, nullcontext() if snapshot is None else snapshot.applied():
        yield


def _snapshot(component: nn.Module, module: nn.Module, values: Mapping[str, Tensor]) -> ParameterSnapshot | None:
    own = _own(module)
    return ParameterSnapshot({name: own[name] for name in values}, None, component, values) if values else None


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by the names that they have without adapters, and without those of adapters."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in module.named_parameters()
        if ".lora_A." not in name and ".lora_B." not in name
    }


@torch.no_grad()
def _of_model(module: nn.Module, theirs: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    own, values = _own(module), {}
    odd = [name for name in own if name not in theirs or theirs[name].shape != own[name].shape]
    if odd:
        raise SettingsError(
            f"{what} is another architecture than the student: {counted(len(odd), 'weight')} differ, first {odd[0]}. "
            "Name an expert that was trained from the same model"
        )
    for name, parameter in own.items():
        value = shard_like(theirs[name].detach().to(parameter.dtype), parameter)
        # what is trained moves away from the start, and what is not is the same for both
        if parameter.requires_grad or not torch.equal(local_part(value), local_part(parameter)):
            values[name] = value
    return values


@torch.no_grad()
def _of_adapter(module: nn.Module, adapter: StartingAdapter) -> dict[str, Tensor]:
    own, weights = _own(module), adapter.weights()
    values = {name: parameter.detach().clone() for name, parameter in own.items() if parameter.requires_grad}
    for layer in sorted(adapter.layers()):
        weight = own.get(f"{layer}.weight")
        up, down = weights[f"{layer}.lora_B.weight"], weights[f"{layer}.lora_A.weight"]
        if weight is None or weight.shape != (up.shape[0], down.shape[1]):
            raise SettingsError(f"{adapter.key}: the adapter in {adapter.folder} does not fit: {layer}")
        delta = shard_like(adapter.scale(layer) * (up.float() @ down.float()), weight)
        values[f"{layer}.weight"] = (weight.detach().float() + delta).to(weight.dtype)
    return values
