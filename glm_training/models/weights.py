"""Weights of a network from elsewhere: a frozen copy of another one, or a file."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TypeVar
from zipfile import is_zipfile

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from glm_training.models.run_folders import weights_below

_DAMAGED = (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, TypeError)
Module = TypeVar("Module", bound=nn.Module)
_BASE = ".base_layer"  # what PEFT puts between the name of a wrapped layer and those of its weights


def frozen_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` without its adapters, if it carries any, without gradients, its weights in `dtype`.

    Each weight is copied in `dtype` at once: a copy in half precision of an fp32 network is never there in fp32.
    """
    memo: dict[int, object] = {}
    for name, param in module.named_parameters():
        copied = param.detach().to(dtype, copy=True) if "lora_" not in name else param.detach().to("meta")
        memo[id(param)] = nn.Parameter(copied, requires_grad=False)
    copy = deepcopy(module, memo)
    for name, layer in list(copy.named_modules()):
        if isinstance(layer, LoraLayer):
            copy.set_submodule(name, layer.get_base_layer())
    if "peft_config" in vars(copy):
        del copy.peft_config
    return copy.requires_grad_(False)


def cast_weights(module: Module, dtype: torch.dtype) -> Module:
    """`module` with its weights in `dtype`, and its buffers as they are."""
    for param in module.parameters():
        param.data = param.data.to(dtype)
    return module


def in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Trained weights in fp32: optimizers need it, as a step of 1e-5 is lost in bf16 weights."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


@torch.no_grad()
def load_weights(module: nn.Module, path: Path) -> None:
    """Set all weights of `module`, adapters left out, from a state dict (.safetensors, or a torch file).

    Raises FileNotFoundError, or ValueError for a damaged file and for a state dict that does not fit.
    """
    check_weights(module, path)
    saved = read_weights(path)
    for name, tensor in _wanted(module).items():
        tensor.copy_(saved[name])


def check_weights(module: nn.Module, path: Path) -> None:
    """Whether `load_weights` would take the file, by the names and shapes in it. `module` may lie on the meta device.

    Raises what `load_weights` raises.
    """
    _require_file(path)
    saved = _shapes(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in _wanted(module).items()}
    unfit = sorted(saved.keys() ^ wanted.keys())
    unfit += sorted(name for name in saved.keys() & wanted.keys() if saved[name] != wanted[name])
    if unfit:
        raise ValueError(
            f"the weights in {path} do not fit the {type(module).__name__}: {len(unfit)} of {len(wanted)} differ, "
            f"first {unfit[0]}"
        )


def _wanted(module: nn.Module) -> dict[str, Tensor]:
    return {name.replace(_BASE, ""): tensor for name, tensor in module.state_dict().items() if "lora_" not in name}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file; of safetensors the header alone is read."""
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_weights(path).items()}
    with _damage_named(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file (.safetensors, or a torch file, where it may stand under "state_dict" or "model"),
    mapped into memory where the format allows it. Raises FileNotFoundError, or ValueError for a damaged file."""
    _require_file(path)
    with _damage_named(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    for outer in ("state_dict", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(outer), dict):
            saved = saved[outer]
    if not isinstance(saved, dict) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ValueError(f"{path} holds no state dict: names with a tensor each")
    return saved


def _require_file(path: Path) -> None:
    if not path.is_file():
        below = weights_below(path)
        instead = f": it is a folder, name a file like {below[-1]}" if below else ""
        raise FileNotFoundError(f"there is no file of weights at {path}{instead}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is no file of weights, or a damaged one ({reason})") from error
