"""Where an SDXL comes from: built in memory for tests, a local diffusers folder, or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import nn

from glm_training.models.family import read_few_steps
from glm_training.models.loading import (
    ModelLoadError,
    PipelineKind,
    check_hub_class,
    check_pipeline_folder,
    hub_options,
    hub_remedy,
    load_errors_explained,
    looks_like_path,
    parts_at_hand,
)
from glm_training.models.sdxl.schedule import NoiseSchedule
from glm_training.models.sdxl.tiny import build_tiny, build_tiny_taesd
from glm_training.models.sdxl.unet import check_networks
from glm_training.utils.writable import expanded

TAESD_FOLDER = "taesd"
"""Folder of a pipeline folder in which `SDXL.save_pretrained` puts TAESD; stock loaders pass it over."""

KIND = PipelineKind(
    "SDXL",
    "stabilityai/stable-diffusion-xl-base-1.0",
    ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    ("unet", "vae", "text_encoder", "text_encoder_2"),
)
NETWORKS = {"unet": "unet"}
"""Folder of a pipeline in which the component's trained network lies."""

_NO_SUCH_VARIANT = ("variant=", "no file named")  # how diffusers and transformers say it

Loaded = TypeVar("Loaded")


def check_source(name: str, taesd: str | None = None) -> None:
    """Everything that can be known of a model, and of a small decoder given apart, before its weights are read. Raises
    ModelLoadError, saying what to do. Of a hub id that is nothing yet: `loading.fetch_parts` asks for it."""
    if name != "tiny-random":
        folder = _local_folder(name)
        if folder is not None:
            check_pipeline_folder(folder, KIND)
            _check_configurations(folder)
    if taesd is not None and taesd != "tiny-random":
        _taesd_folder(taesd)


def _check_configurations(folder: Path) -> None:
    """Whether the parts of a pipeline folder are those of a base SDXL."""
    with load_errors_explained(f"the folder {folder}"), torch.device("meta"):
        unet: Any = load_skeleton(str(folder), "unet")
        settings: Any = AutoencoderKL.load_config(str(folder / "vae"))
        vae = AutoencoderKL.from_config(settings)
    with load_errors_explained(f"the folder {folder}"):
        kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
        if not hasattr(diffusers, kind):
            raise ValueError(f"scheduler_config.json names a {kind}, which diffusers does not have")
        scheduler = getattr(diffusers, kind).from_pretrained(str(folder / "scheduler"))
    try:
        check_networks(unet, vae)
        NoiseSchedule(scheduler)
        read_few_steps(folder)
    except ValueError as error:
        raise ModelLoadError(f"cannot use {folder} as an SDXL: {error}") from error


def load_pipeline(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    local_files_only: bool = False,
    seed: int = 0,
) -> StableDiffusionXLPipeline:
    """The stock pipeline of "tiny-random" (weights from `seed`), a local diffusers folder, or a hub id.

    In half precision the files of variant fp16 are taken where there are any, else the full ones; in fp32 the other way
    round. Only safetensors weights are read and no code from the checkpoint runs. Raises ModelLoadError, within seconds
    when the hub cannot be reached.
    """
    name = str(name_or_path)
    if name == "tiny-random":
        pipeline: Any = build_tiny(seed=seed)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            torch.nn.Module.to(part, dtype)
        return pipeline
    check_source(name)
    folder, hub = _local_folder(name), {}
    if folder is None:
        hub = hub_options(name, "model_index.json", revision=revision, local_files_only=local_files_only)
        check_hub_class(name, hub, KIND.classes)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False} | hub
    source = name if folder is None else str(folder)
    with load_errors_explained(*_place(name, folder, "model.name")):
        return _in_a_variant(lambda kind: StableDiffusionXLPipeline.from_pretrained(source, **options, **kind), dtype)


def load_taesd(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    local_files_only: bool = False,
    seed: int = 0,
) -> AutoencoderTiny:
    """TAESD of "tiny-random", a local folder with its config.json, or a hub id (madebyollin/taesdxl).

    Raises ModelLoadError.
    """
    name = str(name_or_path)
    if name == "tiny-random":
        taesd: Any = build_tiny_taesd(seed=seed)
        return torch.nn.Module.to(taesd, dtype)
    folder, key = _taesd_folder(name), "model.taesd"
    hub = {}
    if folder is None:
        hub = hub_options(name, "config.json", revision=None, local_files_only=local_files_only, key=key)
    options = {"dtype": dtype, "use_safetensors": True} | hub
    source = name if folder is None else str(folder)
    with load_errors_explained(*_place(name, folder, key)):
        return _in_a_variant(lambda kind: AutoencoderTiny.from_pretrained(source, **options, **kind), dtype)


def load_skeleton(name: str, component: str, revision: str | None = None) -> nn.Module | None:
    """The trained network of a component on the meta device, from its configuration; None for a hub id whose
    configuration is not in the local cache. Raises ModelLoadError for one that cannot be read."""
    if name == "tiny-random":
        return cast(nn.Module, build_tiny().components["unet"])  # its scheduler cannot be made on that device
    part = NETWORKS[component]
    folder = parts_at_hand(name, [part], revision)
    if folder is None:
        return None
    with load_errors_explained(f"the configuration in {folder / part}"), torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(str(folder / part))
        return UNet2DConditionModel.from_config(config)  # type: ignore[no-any-return]


def taesd_in(name_or_path: str | Path) -> Path | None:
    """The TAESD that lies in a local pipeline folder, if one does."""
    folder = expanded(name_or_path) / TAESD_FOLDER
    return folder if folder.is_dir() else None


def _in_a_variant(load: Callable[[dict[str, str]], Loaded], dtype: torch.dtype) -> Loaded:
    """`load` with the variant that suits `dtype`, or with the other where the first does not exist."""
    kinds: list[dict[str, str]] = [{}, {"variant": "fp16"}]
    if dtype in (torch.float16, torch.bfloat16):
        kinds.reverse()
    try:
        return load(kinds[0])
    except (OSError, ValueError) as error:
        if not any(sign in str(error) for sign in _NO_SUCH_VARIANT):
            raise
        first = error
    try:
        return load(kinds[1])
    except (OSError, ValueError) as error:
        if any(sign in str(error) for sign in _NO_SUCH_VARIANT):
            raise first from error  # neither exists: speak of the one that was wanted
        raise


def _taesd_folder(name: str) -> Path | None:
    folder = _local_folder(name, "model.taesd")
    if folder is not None and not (folder / "config.json").is_file():
        folder = taesd_in(folder) or taesd_in(folder / "pipeline") or folder
    if folder is not None and not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json: a TAESD is a folder like the hub's madebyollin/taesdxl")
    return folder


def _local_folder(name: str, key: str = "model.name") -> Path | None:
    """`name` as a folder of this machine; None when it is a hub id. Raises ModelLoadError when it is neither."""
    path = expanded(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelLoadError(
            f"{name} is a single file, and a diffusers folder is needed: convert it once with "
            "StableDiffusionXLPipeline.from_single_file(...).save_pretrained(folder)"
        )
    if looks_like_path(name):
        raise ModelLoadError(f"{key} {name} is neither a folder here nor a hub id (owner/name): check the path")
    return None


def _place(name: str, folder: Path | None, key: str) -> tuple[str, str]:
    if folder is not None:
        return f"the folder {folder}", ""
    return f"{name} from the Hugging Face hub or its local cache", hub_remedy(name, key)
