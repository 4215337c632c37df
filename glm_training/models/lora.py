"""LoRA adapters on either half: injected in place, drawn from a named seed, saved as standard PEFT folders.

The module stays what it was (same class, same forward, same hooks), with the targeted linear layers wrapped by PEFT.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from glm_training.utils.randomness import uniform
from glm_training.utils.tensor_file import write_tensor_file
from glm_training.utils.words import counted

ADAPTER = "default"
"""Name of the one adapter a module carries."""

_PREFIX = "base_model.model."  # what PEFT puts before every key of a saved adapter
_WEIGHTS = "adapter_model.safetensors"
_FROZEN_PARTS = {"visual", "vqmodel"}  # of the AR half


def add_lora(
    module: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> list[str]:
    """Freeze `module` and put an adapter on every linear layer whose name ends in one of `targets`.

    `module` is the Hugging Face model itself (``ar.model``, ``dit.transformer``), so that saved names fit it.
    W' = W + (alpha / rank) B A with A ``[rank, in]`` uniform in ±1/sqrt(in) and B zero: nothing changes at first.
    Adapter weights are fp32 on the layer's device, and A depends on (`seed`, layer name) alone. RL wants dropout 0: a
    replay would draw another mask than the rollout.

    Returns the names of the wrapped layers. Raises ValueError for bad numbers, for a target that names no linear layer
    or one in the frozen vision tower or VQ model, and for a module that carries adapters already.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(f"LoRA needs rank >= 1, alpha > 0 and dropout in [0, 1), got {rank}, {alpha} and {dropout}")
    if has_lora(module):
        raise ValueError("the module carries LoRA adapters already")
    check_targets(module, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float works
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
    )
    module.requires_grad_(False)
    _inject(config, module)
    for name, layer in _layers(module):
        _initialise(layer, name, seed)
    return [name for name, _ in _layers(module)]


def has_lora(module: nn.Module) -> bool:
    """Whether `add_lora` or `load_lora` was called on the module."""
    return any(isinstance(child, LoraLayer) for child in module.modules())


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter weights of the module by name, trainable or not; empty without adapters."""
    return {name: param for name, param in module.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the module that receive a gradient, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Inside, the module computes what it did without adapters, bit for bit: the KL reference of a LoRA run."""
    layers = [layer for _, layer in _layers(module)]
    if any(layer.disable_adapters for layer in layers):
        raise RuntimeError("the adapters are disabled already")
    trained = {param: param.requires_grad for param in adapter_parameters(module).values()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for param, requires_grad in trained.items():  # PEFT switches all of them off and on
            param.requires_grad_(requires_grad)


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout off inside, each submodule's own mode back afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Inside, the module is a plain one with B A added to its weights and no adapters in its state dict.

    After, weights and adapters are what they were, bit for bit: the targeted weights are kept on the CPU meanwhile.
    Computed in fp32, then rounded to the weight's dtype. Raises ValueError for weights in few bits.
    """
    wrapped = _layers(module)
    if not all(layer.get_base_layer().weight.is_floating_point() for _, layer in wrapped):
        raise ValueError(
            "adapters cannot be merged into weights in few bits (model.quantization): load the model in full"
        )
    originals: list[Tensor] = []
    try:
        for name, layer in wrapped:
            originals.append(layer.get_base_layer().weight.detach().to("cpu", copy=True))
            _merge(module, name, layer)
        yield
    finally:
        for (name, layer), original in zip(wrapped, originals, strict=False):
            layer.get_base_layer().weight.data.copy_(original)
            module.set_submodule(name, layer)


@torch.no_grad()
def _merge(module: nn.Module, name: str, layer: Any) -> None:
    base = layer.get_base_layer()
    delta = layer.scaling[ADAPTER] * (layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float())
    base.weight.data.copy_(base.weight.float() + delta)
    module.set_submodule(name, base)


def starts_as_base(module: nn.Module) -> bool:
    """Whether the adapters change nothing yet: B is zero in each layer."""
    return not any(param.any() for name, param in adapter_parameters(module).items() if ".lora_B." in name)


def save_lora(module: nn.Module, folder: str | Path) -> None:
    """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors); `PeftModel` loads it too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(described(_config(module)), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    weights = {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): param.detach()
        for name, param in adapter_parameters(module).items()
    }
    write_tensor_file(folder / _WEIGHTS, weights, {"format": "pt"})


def described(config: LoraConfig) -> dict[str, Any]:
    """What PEFT keeps of `config`, its sets as sorted lists: the same adapter is the same bytes in every process."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def load_lora(module: nn.Module, folder: str | Path) -> None:
    """Read a PEFT LoRA folder into the module, adding the adapter when it carries none.

    Raises FileNotFoundError when the folder holds no adapter, ValueError when it does not fit the module.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter folder: needs adapter_config.json and {_WEIGHTS}")
    if not has_lora(module):
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        module.requires_grad_(False)
        _inject(config, module)
    params = adapter_parameters(module)
    saved = load_file(folder / _WEIGHTS)
    named = {key.removeprefix(_PREFIX): value for key, value in saved.items()}
    wanted = {name.replace(f".{ADAPTER}.", "."): param for name, param in params.items()}
    unfit = sorted(named.keys() ^ wanted.keys())
    unfit += [name for name in named.keys() & wanted.keys() if named[name].shape != wanted[name].shape]
    if unfit:
        raise ValueError(
            f"the adapter in {folder} does not fit the model: {counted(len(unfit), 'odd weight')}, first {unfit[0]}"
        )
    with torch.no_grad():
        for name, param in wanted.items():
            param.copy_(named[name])


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, LoraLayer)]


def _config(module: nn.Module) -> LoraConfig:
    if not has_lora(module):
        raise ValueError("the module carries no LoRA adapters")
    return module.peft_config[ADAPTER]  # type: ignore[index,return-value]


def _inject(config: LoraConfig, module: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):  # PEFT's layers draw their first weights from the global generator
        inject_adapter_in_model(config, module, ADAPTER)
    for param in adapter_parameters(module).values():
        param.data = param.data.float()


def _initialise(layer: Any, name: str, seed: int) -> None:
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    bound = down.shape[1] ** -0.5
    draws = uniform(seed, f"lora/{name}", [()], tuple(down.shape))[0]
    with torch.no_grad():
        down.copy_((2 * draws - 1) * bound)
        up.zero_()


def check_targets(module: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError, naming every fault, unless each target is the ending of the names of linear layers, and of
    nothing else, that may be trained. `module` may lie on the meta device.

    As in PEFT, a list holds endings that begin at a dot or at the start: "to_q" reaches "attn1.to_q". PEFT would also
    take a pattern or "all-linear", as a text in the list's place; here they are no name.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"LoRA targets must be a list of layer names, got {targets!r}")
    layers = {name: child for name, child in module.named_modules() if name}
    known = target_names(module)
    problems = [problem for target in targets if (problem := _target_problem(target, layers, known)) is not None]
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Layers that can be named, by their endings: {', '.join(known)}")


def target_names(module: nn.Module) -> list[str]:
    """The shortest endings by which `check_targets` lets its linear layers be named, alphabetically."""
    layers = {name: child for name, child in module.named_modules() if name}
    shortest: dict[str, None] = {}
    for name, child in layers.items():
        if not isinstance(child, nn.Linear) or _is_frozen(name):
            continue
        words = name.split(".")
        endings = (".".join(words[start:]) for start in reversed(range(len(words))) if not words[start].isdigit())
        shortest.setdefault(next((each for each in endings if _only_trainable(each, layers)), name))
    return sorted(shortest)


def reached_layers(module: nn.Module, targets: Sequence[str]) -> set[str]:
    """Names of the layers that `add_lora` would wrap."""
    layers = {name: child for name, child in module.named_modules() if name}
    return {name for target in targets for name in _reached(target, layers)}


def _target_problem(target: str, layers: dict[str, nn.Module], known: Sequence[str]) -> str | None:
    reached = _reached(target, layers)
    frozen = [name for name in reached if _is_frozen(name)]
    if frozen:
        return f"LoRA target {target!r} reaches {frozen[0]}, a part that stays frozen; name it more closely"
    if not any(isinstance(layers[name], nn.Linear) for name in reached):
        nearest = difflib.get_close_matches(target, known, n=1)
        return f"LoRA target {target!r} names no linear layer" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
    other = next((name for name in reached if not isinstance(layers[name], nn.Linear)), None)
    if other is not None:
        kind = type(layers[other]).__name__
        return f"LoRA target {target!r} reaches {other}, a {kind} and no linear layer; name it more closely"
    return None


def _reached(target: str, layers: dict[str, nn.Module]) -> list[str]:
    return [name for name in layers if name == target or name.endswith(f".{target}")]


def _only_trainable(ending: str, layers: dict[str, nn.Module]) -> bool:
    return all(isinstance(layers[name], nn.Linear) and not _is_frozen(name) for name in _reached(ending, layers))


def _is_frozen(name: str) -> bool:
    return not _FROZEN_PARTS.isdisjoint(name.split("."))


@contextmanager
def adapters_scaled(module: nn.Module, scale: float) -> Iterator[None]:
    """Inside, the module computes W + `scale` (alpha / rank) B A; at 0 what it did without adapters.

    With gradient checkpointing leave it after the backward pass only: blocks are recomputed there. Nested scales
    multiply. Raises ValueError without adapters, or for a scale that is negative or not finite.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number >= 0, got {scale}")
    layers = [child for child in module.modules() if isinstance(child, LoraLayer)]
    if not layers:
        raise ValueError("the module carries no LoRA adapters")
    if scale == 0:  # not computed at all
        with adapters_disabled(module):
            yield
        return
    before = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, strength in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = strength * scale
        yield
    finally:
        for layer, strength in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = strength
