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
from typing import Any, TypeAlias

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from glm_training.utils.tensor_file import DTYPE_NAMES

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
    def __init__(self) -> None:
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
        if isinstance(tensor, DTensor):
            raise CheckpointError(f"{path} is sharded over processes; call gather_shards(tree) on every process first")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path} is {tensor.layout} of {tensor.dtype}, which safetensors cannot hold")
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if tensor.numel() and view in self._seen:
            return self._seen[view]
        name, copies = path or "value", 0
        while name in self.tensors or name == "__metadata__":
            copies += 1
            name = f"{path}~{copies}"
        self.tensors[name] = tensor.detach()
        self._seen[view] = name
        return name


def encode(tree: StateTree) -> EncodedTree:
    """Take a tree apart. Tensors are referred to, not copied: write them before they change.

    Raises:
        CheckpointError: naming the place in the tree of a value that cannot be stored.
    """
    encoder = _Encoder()
    structure = encoder.encode(tree, "")
    return EncodedTree(structure, encoder.tensors)


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


def read_tree(structure_file: Path, tensor_file: Path | None) -> StateTree:
    """Read the two files of a tree, tensors on the CPU. ``tensor_file`` is None for a tree without tensors."""
    try:
        structure = json.loads(structure_file.read_text(encoding="utf-8"))
        tensors = load_file(tensor_file) if tensor_file is not None else {}
        return decode(structure, tensors)
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


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``whole`` laid out as ``parameter`` is: on its device, and this process's shard if it is a ``DTensor``.

    The reverse of :func:`gather_shards`; every process passes the same whole tensor, and nothing is sent.
    """
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device, copy=True)
    on_device = whole.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


def optimizer_state_tree(optimizer: Optimizer) -> StateTree:
    """The optimizer's state with its integer parameter numbers. Tensors are the live ones, not copies."""
    return optimizer.state_dict()


def load_optimizer_state_tree(optimizer: Optimizer, tree: StateTree) -> None:
    """Give an optimizer the state another had, bit for bit; tensors are copied to their parameters' devices and shards.

    Torch's own ``load_state_dict`` casts state to the parameter's dtype, which would round fp32 moments of bf16
    parameters; here each tensor keeps the dtype it was saved with.

    Raises:
        CheckpointError: when the parameter groups do not have the sizes they were saved with.
    """
    saved = [len(group["params"]) for group in tree["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if saved != here:
        raise CheckpointError(
            f"the saved optimizer state has groups of {saved} parameters, this optimizer has {here}; resume with the "
            "trained component, the LoRA targets and the optimizer the checkpoint was made with"
        )
    optimizer.load_state_dict(tree)
    numbers = [number for group in tree["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in tree["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                # Counters stay where the optimizer put them (mostly the CPU); moments have their parameter's layout.
                moment = value.shape == parameter.shape and key != "step"
                like = parameter if moment else optimizer.state[parameter][key]
                optimizer.state[parameter][key] = shard_like(value, like)
