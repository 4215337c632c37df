"""Adapters of earlier runs as a starting point: found in the folders that a run leaves, held against the model before
it is loaded, merged into its weights, or trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from glm_training.models.adapter_settings import (
    CONFIG,
    alpha_told,
    by_pattern,
    faults,
    settings_of,
    unlike_its_weights,
)
from glm_training.models.family import Family
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import adapter_parameters, reached_layers
from glm_training.models.run_folders import ADAPTER_FILES, adapters_in
from glm_training.utils.words import counted

_ENDINGS = (".lora_A.weight", ".lora_B.weight")
"""A is [rank, in], B is [out, rank]."""
_OLDER = (".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's `init_lora_weights` that set out from other weights than the model's."""
_PREFIXES = ("base_model.model.", "unet.", "transformer.")


@dataclass(frozen=True)
class StartingAdapter:
    """An adapter in `folder` for `part` of the model, named under `key`. shapes: of its weights by name, as in
    `blocks.0.to_q.lora_A.weight`. rank, alpha: B A is scaled by alpha / rank; None where layers differ in that.
    settings: what it says of itself. strength: by which B A is scaled besides."""

    key: str
    part: str
    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    rank: int | None
    alpha: float | None
    settings: Mapping[str, Any]
    strength: float = 1.0

    @property
    def file(self) -> Path:
        """Its weights."""
        return weights_file(self.folder)

    def weights(self) -> dict[str, Tensor]:
        """By name."""
        return {_plain(name): value for name, value in load_file(self.file).items()}

    def layers(self) -> set[str]:
        """Names of the layers that it adapts."""
        return {name.partition(".lora_")[0] for name in self.shapes}

    def scale(self, layer: str) -> float:
        """By which B A of a layer is multiplied: strength alpha / rank, of rank-stabilised adapters strength alpha /
        sqrt(rank) (arXiv:2312.03732)."""
        rank = self.shapes[f"{layer}.lora_A.weight"][0]
        own = by_pattern(self.settings, "alpha_pattern", layer)
        alpha = alpha_told(self.settings, rank) if own is None else float(own)
        return self.strength * alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def starting_adapters(key: str, places: Sequence[str], components: Sequence[str]) -> list[StartingAdapter]:
    """The adapters that `places` mean for the `components` of a model: folders of adapters, checkpoints, or runs, of
    which it is the newest. ModelLoadError, with all that is wrong, where there is none."""
    found, problems = [], []
    for place in places:
        try:
            for part, folder in adapters_in(place, components, key).items():
                found.append(_read(key, part, folder))
        except ModelLoadError as error:
            problems.append(str(error))
    if problems:
        raise ModelLoadError("\n".join(problems))
    return found


def malformed(adapter: StartingAdapter) -> str | None:
    """Why an adapter is none that is read here, whatever the model; None where it is one."""
    told = f"{adapter.key}: the adapter in {adapter.folder}"
    if not adapter.shapes:
        return f"{told} holds no weights"
    start = str(adapter.settings.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        return (
            f"{told} was begun by {start}, which takes its first B A off the weights of the model: it is none of that "
            "model. Save it with path_initial_model_for_weight_conversion of PEFT, which makes it one"
        )
    older = next((name for name in adapter.shapes if any(mark in name for mark in _OLDER)), None)
    if older is not None:
        return f"{told} has weights named as kohya's scripts do, as {older}: save it in diffusers' or PEFT's format"
    odd = [name for name, shape in adapter.shapes.items() if len(shape) != 2 or not name.endswith(_ENDINGS)]
    if odd:
        return f"{told} has more than the matrices A and B of linear layers: {odd[0]} {list(adapter.shapes[odd[0]])}"
    for layer in sorted(adapter.layers()):
        a, b = (adapter.shapes.get(f"{layer}{ending}") for ending in _ENDINGS)
        if a is None or b is None or a[0] != b[1] or a[0] == 0:
            return f"{told} is not whole: {layer} has A {a and list(a)} and B {b and list(b)}"
    ranks = {layer: adapter.shapes[f"{layer}.lora_A.weight"][0] for layer in sorted(adapter.layers())}
    if other := unlike_its_weights(adapter.settings, ranks):
        return f"{adapter.key}: {_settings_file(adapter.folder)}: {other}"
    return None


def misfit(adapter: StartingAdapter, module: nn.Module) -> str | None:
    """Why an adapter cannot be merged into the component `module`, which may lie on the meta device; None where it
    can."""
    if reason := malformed(adapter):
        return reason
    layers = dict(module.named_modules())
    odd = [name for name in adapter.shapes if not _fits(name, adapter.shapes[name], layers)]
    if not odd:
        return None
    layer = layers.get(odd[0].partition(".lora_")[0])
    there = f"a layer {layer.in_features} -> {layer.out_features}" if isinstance(layer, nn.Linear) else "no such layer"
    return (
        f"{adapter.key}: the adapter in {adapter.folder} does not fit the {adapter.part} of this model: "
        f"{counted(len(odd), 'weight')} of {len(adapter.shapes)} have no linear layer of their shape, first {odd[0]} "
        f"{list(adapter.shapes[odd[0]])}, where the model has {there}"
    )


def unlike(adapter: StartingAdapter, module: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> str | None:
    """Why adapters of `rank` and `alpha` on the `targets` of `module` cannot go on from `adapter`; None where they
    can."""
    if reason := misfit(adapter, module):
        return reason
    if adapter.rank is None or adapter.alpha is None:
        return (
            f"{adapter.key}: the adapter in {adapter.folder} has layers of several ranks or strengths, as none under "
            "training has: merge it with model.adapters"
        )
    own = {"rank": (adapter.rank, rank), "alpha": (adapter.alpha, alpha)}
    other = [f"lora.{name}: {value:g}" for name, (value, ours) in own.items() if not _as_told(value, ours)]
    if other:
        return f"{adapter.key}: the adapter in {adapter.folder} is another one: set {' and '.join(other)}"
    strange = sorted(adapter.layers() ^ reached_layers(module, targets))
    if strange:
        return (
            f"{adapter.key}: the adapter in {adapter.folder} is not on the layers of lora.{adapter.part}_targets: "
            f"{counted(len(strange), 'layer')} differ, first {strange[0]}"
        )
    return None


@torch.no_grad()
def merge_into(family: Family, adapters: Sequence[StartingAdapter]) -> None:
    """Adds adapters to the weights of a model without any: W + sum of strength_i alpha_i / r_i B_i A_i, in fp32, which
    is rounded to the dtype of W once. Raises ModelLoadError, before a weight is changed, with all that do not fit."""
    reasons = [reason for each in adapters if (reason := misfit(each, family.module(each.part)))]
    if reasons:
        raise ModelLoadError("\n".join(reasons))
    held = [(each, each.weights()) for each in adapters]
    odd = [_not_finite(each, weights) for each, weights in held]
    if any(odd):
        raise ModelLoadError("\n".join(filter(None, odd)))
    for part, layer in sorted({(each.part, layer) for each in adapters for layer in each.layers()}):
        weight = family.module(part).get_parameter(f"{layer}.weight")
        total = weight.float()
        for each, weights in held:
            if each.part == part and f"{layer}.lora_A.weight" in each.shapes:
                a, b = (weights[f"{layer}.lora_{side}.weight"].to(weight.device).float() for side in "AB")
                total = total + each.scale(layer) * (b @ a)
        weight.data.copy_(total)


def _not_finite(adapter: StartingAdapter, weights: Mapping[str, Tensor]) -> str | None:
    told = f"{adapter.key}: the adapter in {adapter.folder} is not finite, first"
    name = next((name for name, value in weights.items() if not value.float().isfinite().all()), None)
    if name is not None:
        return f"{told} at {name}"
    layer = next((layer for layer in sorted(adapter.layers()) if not math.isfinite(adapter.scale(layer))), None)
    return None if layer is None else f"{told} in the alpha of {layer}"


@torch.no_grad()
def start_from(module: nn.Module, adapter: StartingAdapter) -> None:
    """Sets the adapters that a module carries to the weights of another one, which is not `unlike`. ModelLoadError."""
    weights = adapter.weights()
    own = {name.replace(".default.", "."): param for name, param in adapter_parameters(module).items()}
    if own.keys() != weights.keys():
        raise ModelLoadError(f"{adapter.key}: the adapter in {adapter.folder} is on other layers")
    for name, param in own.items():
        param.copy_(weights[name])


def _read(key: str, part: str, folder: Path) -> StartingAdapter:
    try:
        with safe_open(weights_file(folder), framework="pt") as file:
            shapes = {_plain(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            metadata = file.metadata() or {}
        settings = settings_of(folder, metadata)
        wrong = list(faults(folder, settings))
        rank, alpha = (None, None) if wrong else _strength(shapes, settings)
        for pattern in (*(settings.get("alpha_pattern") or {}), *(settings.get("rank_pattern") or {})):
            re.compile(pattern)
    except (OSError, ValueError, TypeError, SafetensorError, AttributeError, re.error) as error:
        raise ModelLoadError(f"{key}: the adapter in {folder} cannot be read ({error})") from error
    if wrong:
        raise ModelLoadError("\n".join(f"{key}: {_settings_file(folder)}: {each}" for each in wrong))
    return StartingAdapter(key, part, folder, shapes, rank, alpha, settings)


def _strength(shapes: Mapping[str, tuple[int, ...]], told: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Rank and alpha of all layers; None for what differs from layer to layer. Rank-stabilised adapters are scaled by
    alpha / sqrt(rank) (arXiv:2312.03732)."""
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1 or told.get("alpha_pattern"):
        return None, None
    (rank,) = ranks
    alpha = alpha_told(told, rank)
    return rank, alpha * math.sqrt(rank) if told.get("use_rslora") else alpha


def _as_told(value: float, ours: float) -> bool:
    """Whether two numbers are one, as far as messages tell them: to six digits."""
    return math.isclose(value, ours, rel_tol=1e-5)


def _settings_file(folder: Path) -> Path:
    return folder / CONFIG if (folder / CONFIG).is_file() else weights_file(folder)


def weights_file(folder: Path) -> Path:
    """The weights of the adapter in `folder`: PEFT's, or else diffusers'."""
    return next(
        (folder / name for name in ("adapter_model.safetensors", ADAPTER_FILES[1]) if (folder / name).is_file()),
        folder / "adapter_model.safetensors",
    )


def _plain(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _fits(name: str, shape: tuple[int, ...], layers: Mapping[str, nn.Module]) -> bool:
    owner, _, which = name.partition(".lora_")
    layer = layers.get(owner)
    if not isinstance(layer, nn.Linear):
        return False
    return shape[1] == layer.in_features if which == "A.weight" else shape[0] == layer.out_features
