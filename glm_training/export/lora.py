"""Adapters as files for other programs.

PEFT: `lora_<part>/adapter_config.json` and `adapter_model.safetensors`, as they were trained: A, B, and alpha in the
settings, without which nobody can read them.

diffusers: `pytorch_lora_weights.safetensors`, whose readers may pass over the header, where alpha stands: B is written
times alpha / rank, and the header says that alpha is the rank, so that all come to the same W + B A.

kohya: `kohya_lora.safetensors`, `lora_unet_<layer>.lora_down.weight` (A), `.lora_up.weight` (B) and `.alpha`, a tensor
of one number: W + alpha / rank B A. SDXL's layers have the names of its first code, as in sd-scripts
(`input_blocks_4_1_..`); the transformer of GLM-Image, which had none, those of diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from glm_training.export.source import Adapter, ExportError
from glm_training.utils.tensor_file import write_tensor_file

DIFFUSERS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
PREFIX = {"unet": "unet", "dit": "transformer"}
"""Part -> the module of diffusers' pipeline; the AR half is a model of transformers, which reads PEFT's folder."""


def write_adapters(
    folder: Path, adapters: Sequence[Adapter], dtype: torch.dtype | None, base: str | None, layers_per_block: int | None
) -> None:
    """All the files of the adapters of a run. `base`: the name of the model that others may know, for PEFT's settings;
    `layers_per_block`: of SDXL's UNet. Raises ExportError for adapters that change nothing, and OSError."""
    for adapter in adapters:
        require_change(adapter)
        write_peft(folder / f"lora_{adapter.part}", adapter, dtype, base)
        if adapter.part in PREFIX:
            write_diffusers(folder / DIFFUSERS_FILE, adapter, dtype)
            write_kohya(folder / KOHYA_FILE, adapter, dtype, layers_per_block)


def require_change(adapter: Adapter) -> None:
    """Raises ExportError for an adapter that is not finite, or in which A or B is zero in every layer."""
    for name, value in adapter.weights.items():
        if not value.isfinite().all():
            raise ExportError(f"the adapter of the {adapter.part} is not finite, first at {name}")
    if not any(a.any() and b.any() for a, b in adapter.layers().values()):
        raise ExportError(
            f"the adapter of the {adapter.part} changes nothing, as A or B is zero in every layer: this checkpoint "
            "was saved before it learned anything, or --dtype cannot hold what it learned"
        )


def write_peft(folder: Path, adapter: Adapter, dtype: torch.dtype | None, base: str | None) -> None:
    """The folder that PEFT's `from_pretrained` and transformers' `load_adapter` read."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(adapter.settings) | {"base_model_name_or_path": base, "inference_mode": True}
    (folder / PEFT_FILES[0]).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {f"base_model.model.{name}": _cast(value, dtype) for name, value in adapter.weights.items()}
    write_tensor_file(folder / PEFT_FILES[1], weights, {"format": "pt"})


def write_diffusers(file: Path, adapter: Adapter, dtype: torch.dtype | None) -> None:
    """The file that diffusers' `load_lora_weights` and `load_lora_adapter` read, alpha in B."""
    prefix, weights = PREFIX[adapter.part], {}
    for layer, (a, b) in adapter.layers().items():
        weights[f"{prefix}.{layer}.lora_A.weight"] = _cast(a, dtype)
        weights[f"{prefix}.{layer}.lora_B.weight"] = _cast(adapter.scale * b.float(), dtype or b.dtype)
    settings = dict(adapter.settings) | {"lora_alpha": adapter.rank, "base_model_name_or_path": None}
    told = {f"{prefix}.{key}": value for key, value in settings.items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(told, indent=2, sort_keys=True)}
    write_tensor_file(file, weights, metadata)


def write_kohya(file: Path, adapter: Adapter, dtype: torch.dtype | None, layers_per_block: int | None) -> None:
    """The file that readers of kohya's scripts know, alpha in a tensor beside each layer and in the header."""
    weights: dict[str, Tensor] = {}
    for layer, (a, b) in adapter.layers().items():
        name = kohya_name(layer, layers_per_block)
        weights[f"{name}.lora_down.weight"] = _cast(a, dtype)
        weights[f"{name}.lora_up.weight"] = _cast(b, dtype)
        weights[f"{name}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
    if len(weights) != 3 * len(adapter.layers()):
        raise ExportError(f"two layers of the {adapter.part} have the same name in kohya's format")
    metadata: dict[str, Any] = {"format": "pt", "ss_network_module": "networks.lora"}
    metadata |= {"ss_network_dim": str(adapter.rank), "ss_network_alpha": f"{adapter.alpha:g}"}
    if adapter.part == "unet":
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    write_tensor_file(file, weights, metadata)


def kohya_name(layer: str, layers_per_block: int | None) -> str:
    """`lora_unet_transformer_blocks_0_attn1_to_q` of `transformer_blocks.0.attn1.to_q`; of SDXL's UNet, which has
    `layers_per_block`, under the name of `sgm_name`."""
    own = layer if layers_per_block is None else sgm_name(layer, layers_per_block)
    return f"lora_unet_{own.replace('.', '_')}"


_SGM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)")


def sgm_name(layer: str, layers_per_block: int) -> str:
    """The name that a linear layer of diffusers' SDXL UNet has in Stability's own code: `input_blocks.4.1.proj_in` of
    `down_blocks.1.attentions.0.proj_in` (two layers per block).

    There every layer of a block is an input block, and its downsampler one more; every output block is a layer, the
    last of a block with the upsampler. Raises ExportError for a layer that has no name there.
    """
    if layer in _SGM:
        return _SGM[layer]
    found = _BLOCK.fullmatch(layer)
    if found is None:
        raise ExportError(f"{layer} has no name in kohya's format of SDXL")
    way, block, kind, place, rest = found.groups()
    inner = 0 if kind == "resnets" else 1
    rest = rest.replace("time_emb_proj", "emb_layers.1") if kind == "resnets" else rest
    if way is None:  # resnet, attention, resnet
        return f"middle_block.{1 if inner else 2 * int(place)}.{rest}"
    number = (layers_per_block + 1) * int(block) + int(place)
    return f"input_blocks.{number + 1}.{inner}.{rest}" if way == "down" else f"output_blocks.{number}.{inner}.{rest}"


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.detach() if dtype is None else value.detach().to(dtype)
