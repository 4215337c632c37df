"""State trees and their two files: tensors in a safetensors file, everything around them in JSON. Never pickle.

A state tree is any nesting of dicts (keys ``str`` or ``int``), lists and tuples over tensors, numbers, strings,
booleans and None. It comes back as it went in: key types and order, tuples, NaN and infinities, 0-d and empty tensors
included. A tensor that occurs twice (tied weights) is stored once and comes back as one tensor.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from glm_training.utils.tensor_file import DTYPE_NAMES
from glm_training.utils.words import counted

# A recursive alias would make every reader of a loaded tree cast at every level; encode() checks at run time instead.
StateTree: TypeAlias = Any


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, verified or read; the message names the file and the remedy."""


@dataclass(frozen=True)
class EncodedTree:
    """A tree taken apart: ``structure`` is JSON whose ``{"$tensor": name}`` leaves refer to ``tensors``."""

    structure: Any
    tensors: dict[str, Tensor]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class _Encoder:
    def __init__(self, in_shards: bool) -> None:
        self.in_shards = in_shards
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[tuple[Any, ...], str] = {}

    def encode(self, value: StateTree, path: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._name(value, path)}
        if isinstance(value, list):
            return [self.encode(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        raise CheckpointError(
            f"{path or 'the tree'} holds a {type(value).__module__}.{type(value).__qualname__}; a checkpoint keeps "
            "tensors, numbers, strings, booleans, None, and lists, tuples and dicts of them: convert it in state_dict()"
        )

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise CheckpointError(f"{path or 'the tree'} has the key {key!r}; a checkpoint keeps str and int keys")
        items = [(key, self.encode(item, f"{path}.{key}" if path else str(key))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$items": [[key, item] for key, item in items]}

    def _name(self, tensor: Tensor, path: str) -> str:
        if isinstance(tensor, DTensor) and not self.in_shards:
            raise CheckpointError(f"{path} is sharded over processes; call gather_shards(tree) on every process first")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path} is {tensor.layout} of {tensor.dtype}, which safetensors cannot hold")
        held = local_part(tensor)
        view = (tensor.device, held.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if tensor.numel() and view in self._seen and not isinstance(tensor, DTensor):  # an empty shard is no view
            return self._seen[view]
        name, copies = path or "value", 0
        while name in self.tensors or name == "__metadata__":
            copies += 1
            name = f"{path}~{copies}"
        self.tensors[name] = tensor.detach()
        self._seen[view] = name
        return name


def encode(tree: StateTree, *, in_shards: bool = False) -> EncodedTree:
    """Take a tree apart. Tensors are referred to, not copied: write them before they change. ``in_shards``: sharded
    ones may be among them, to be written by all processes.

    Raises:
        CheckpointError: naming the place in the tree of a value that cannot be stored.
    """
    encoder = _Encoder(in_shards)
    structure = encoder.encode(tree, "")
    return EncodedTree(structure, encoder.tensors)


def lies_in_shards(tree: EncodedTree) -> bool:
    """Whether any of its tensors does."""
    return any(isinstance(tensor, DTensor) for tensor in tree.tensors.values())


def decode(structure: Any, tensors: Mapping[str, Tensor]) -> StateTree:
    """The tree that :func:`encode` took apart."""
    if isinstance(structure, list):
        return [decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "$tensor" in structure:
        return tensors[structure["$tensor"]]
    if "$float" in structure:
        return float(structure["$float"])
    if "$tuple" in structure:
        return tuple(decode(item, tensors) for item in structure["$tuple"])
    if "$items" in structure:
        return {key: decode(item, tensors) for key, item in structure["$items"]}
    return {key: decode(item, tensors) for key, item in structure.items()}


def structure_bytes(encoded: EncodedTree) -> bytes:
    """The JSON file of an encoded tree."""
    return json.dumps(encoded.structure, allow_nan=False, ensure_ascii=False, indent=1).encode("utf-8")


def read_tree(structure_file: Path, tensors: Path | Mapping[str, Any] | None) -> StateTree:
    """Read a tree: its structure, and its tensors from their file, on the CPU, or as they are given by name.
    ``tensors`` is None for a tree without any."""
    try:
        structure = json.loads(structure_file.read_text(encoding="utf-8"))
        return decode(structure, load_file(tensors) if isinstance(tensors, Path) else tensors or {})
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{structure_file} and its tensors do not fit together: {error}") from error


def gather_shards(tree: StateTree, *, keep: bool = True) -> StateTree:
    """Replace each sharded tensor (FSDP2's ``DTensor``) by the whole one on the CPU; the rest is passed on.

    A collective: every process calls it on trees of one shape. Processes that do not write pass ``keep=False`` and get
    empty tensors in place of the whole ones.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor().detach()
        return whole.to("cpu") if keep else whole.new_empty(0)
    if isinstance(tree, Mapping):
        return {key: gather_shards(item, keep=keep) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [gather_shards(item, keep=keep) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


class Stored(Protocol):
    """A tensor that is still on the disk."""

    @property
    def shape(self) -> torch.Size: ...

    def whole(self) -> Tensor: ...

    def like(self, parameter: Tensor) -> Tensor: ...


def shard_like(whole: Tensor | Stored, parameter: Tensor) -> Tensor:
    """A copy of ``whole`` laid out as ``parameter`` is: on its device, and this process's shard if it is a ``DTensor``.

    The reverse of :func:`gather_shards`; every process passes the same whole tensor, and nothing is sent.
    """
    if not isinstance(whole, Tensor):
        return whole.like(parameter)
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device, copy=True)
    on_device = whole.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a ``DTensor``, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_state_tree(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> StateTree:
    """What an optimizer remembers of each of `parameters`, by name, and its class. Tensors are the live ones.

    Hyperparameters are left out: they are the configuration's to say, also of a run that goes on. What some optimizers
    find out for a whole group, `GROUP_MEMORY`, is kept with the names that it is of.
    """
    packed, numbers = optimizer.state_dict(), _numbers(optimizer, parameters)
    state = {name: packed["state"][number] for name, number in numbers.items() if number in packed["state"]}
    tree: StateTree = {"optimizer": type(optimizer).__name__, "state": state}
    found = [(names, group) for names, group in _named_groups(optimizer, parameters) if "k" in group]
    if found:
        tree["groups"] = [
            {"parameters": names, "memory": {key: group[key] for key in GROUP_MEMORY if key in group}}
            for names, group in found
        ]
    return tree


def load_optimizer_state_tree(optimizer: Optimizer, parameters: Mapping[str, Parameter], tree: StateTree) -> None:
    """Give an optimizer what another remembered, bit for bit; it keeps its own groups and hyperparameters.

    Tensors are copied to their parameters' devices and shards. Torch's own ``load_state_dict`` casts state to the
    parameter's dtype, which would round fp32 moments of bf16 parameters; here each tensor keeps the dtype it was saved
    with.

    Raises:
        CheckpointError: for the state of another class of optimizer, or of parameters that are not these.
    """
    here, saved = type(optimizer).__name__, tree.get("optimizer")
    if saved is not None and saved != here:
        raise CheckpointError(
            f"the checkpoint holds the state of the optimizer {saved}, from which this run's {here} cannot go on; "
            "resume with the one the checkpoint was made with"
        )
    numbers, state = _numbers(optimizer, parameters), _state_by_name(tree, parameters)
    strange = sorted(state.keys() - numbers.keys())
    if strange:
        raise CheckpointError(
            f"the saved optimizer state has {counted(len(strange), 'parameter')} not trained here, first {strange[0]}; "
            "resume with the trained component and the LoRA targets the checkpoint was made with"
        )
    memory_of = {name: saved["memory"] for saved in tree.get("groups", []) for name in saved["parameters"]}
    for names, group in _named_groups(optimizer, parameters):
        group.update(memory_of.get(names[0], {}))
    groups = optimizer.state_dict()["param_groups"]
    laid_out = {
        name: {key: _laid_out(value, key, parameters[name]) for key, value in entry.items()}
        for name, entry in state.items()
    }
    optimizer.load_state_dict({"state": {numbers[name]: laid_out[name] for name in laid_out}, "param_groups": groups})
    for name, entry in laid_out.items():
        kept = optimizer.state[parameters[name]]
        for key, value in entry.items():
            if isinstance(value, Tensor):
                # Counters stay where the optimizer put them, mostly the CPU.
                moment = value.shape == parameters[name].shape and key != "step"
                kept[key] = value if moment else value.to(kept[key].device)


def _laid_out(value: Any, key: str, parameter: Parameter) -> Any:
    """A saved value of an optimizer: a moment laid out as its parameter is, another tensor whole."""
    if not isinstance(value, bool | int | float | str | None) and hasattr(value, "shape"):
        if value.shape == parameter.shape and key != "step":
            return shard_like(value, parameter)
        return value.clone() if isinstance(value, Tensor) else value.whole()
    return value


GROUP_MEMORY = ("k", "d", "d_max", "d_numerator", "weight_sum", "lr_max")
"""Keys of a group that are found in training, where it has them: Prodigy's steps and estimates of the distance, and
schedule-free's steps and weight of the average. The others are hyperparameters."""


def _named_groups(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> list[tuple[list[str], dict[str, Any]]]:
    """The groups, with the names of their parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [([names[id(parameter)] for parameter in group["params"]], group) for group in optimizer.param_groups]


def _numbers(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, int]:
    """The number that ``optimizer.state_dict()`` gives each of `parameters`: their place over all groups."""
    places = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number_of = {id(parameter): number for number, parameter in enumerate(places)}
    return {name: number_of[id(parameter)] for name, parameter in parameters.items()}


def _state_by_name(tree: StateTree, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """The saved state by name. Checkpoints once held what torch gives: one group, numbers in the order of `parameters`.

    Raises CheckpointError when those are not as many as there are parameters.
    """
    if "param_groups" not in tree:
        return dict(tree["state"])
    numbers = [number for group in tree["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        raise CheckpointError(
            f"the saved optimizer state is of {counted(len(numbers), 'parameter')}, and {len(parameters)} here; resume "
            "with the trained component and the LoRA targets the checkpoint was made with"
        )
    pairs = zip(parameters, numbers, strict=True)
    return {name: tree["state"][number] for name, number in pairs if number in tree["state"]}
