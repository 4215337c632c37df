"""The networks of a model on the meta device: from its own configurations where they are here, else from published
ones that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glm_training.models.loading import (
    ModelLoadError,
    load_errors_explained,
    looks_like_path,
    parts_at_hand,
    published_configuration,
)
from glm_training.models.run_folders import pipeline_in
from glm_training.utils.writable import expanded

PUBLISHED = {"glm_image": "zai-org/GLM-Image", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
"""By `model.family`: the model whose configurations ship with the package."""

Build = Callable[[dict[str, Any]], nn.Module]


@dataclass(frozen=True)
class Networks:
    """The networks of a pipeline by the names of their folders, on the meta device; `origin`: where their
    configurations come from, in words."""

    parts: Mapping[str, nn.Module]
    origin: str


def read_networks(family: str, name: str, revision: str | None = None) -> Networks:
    """The networks of `model.name`. Never asks the hub.

    Raises ModelLoadError for a family without published configurations, a folder that lacks some, and a hub id that is
    neither in the local cache nor published here.
    """
    if family not in PUBLISHED:
        raise ModelLoadError(f"pipelines are of the families {' and '.join(PUBLISHED)}, and model.family is {family}")
    builders = _builders(family)
    if name == "tiny-random":
        return Networks(_tiny_random(family), "the tiny model with random weights")
    if family == "glm_image" and name == "full-width":
        from glm_training.models.glm_image.full_width import full_width_configuration

        made = {part: build_network(family, part, full_width_configuration(part)) for part in builders}
        return Networks(made, "the published widths with 2 layers each and random weights")
    folder, origin = _tiny_folder(family) if name == "tiny" else None, f"the configurations of {name}"
    source = pipeline_in(name)
    if folder is None:
        folder = parts_at_hand(source, list(builders), revision)
    if folder is not None:
        files = {part: folder / part / "config.json" for part in builders}
    elif name == PUBLISHED[family]:
        made = {part: build_network(family, part, published_configuration(family, part)) for part in builders}
        origin = f"the published configurations of {name}, which ship with glm_training (it is not on this machine)"
        return Networks(made, origin)
    elif looks_like_path(source) or expanded(source).is_dir():
        raise ModelLoadError(f"model.name {name} has no folders {', '.join(builders)} with a config.json each")
    else:
        raise ModelLoadError(
            f"{name} is not in the local cache, and the configurations that ship are those of {PUBLISHED[family]}\n"
            f"What to do: hf download {name} --include '*.json', or plan with model.name={PUBLISHED[family]}"
        )
    return Networks({part: _read(files[part], build) for part, build in builders.items()}, origin)


def build_network(family: str, part: str, settings: dict[str, Any]) -> nn.Module:
    """The network that a configuration describes, on the meta device."""
    with torch.device("meta"):
        return _builders(family)[part](settings)


def _read(file: Path, build: Build) -> nn.Module:
    with load_errors_explained(f"the configuration {file}"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        with torch.device("meta"):
            return build(settings)


def _tiny_folder(family: str) -> Path | None:
    from glm_training.models.glm_image.tiny import TINY_FOLDER

    return TINY_FOLDER if family == "glm_image" else None


def _tiny_random(family: str) -> dict[str, nn.Module]:
    if family == "glm_image":
        from glm_training.models.glm_image.tiny import build_tiny as build_glm

        pipeline: Any = build_glm()
    else:
        from glm_training.models.sdxl.tiny import build_tiny as build_sdxl

        pipeline = build_sdxl()
    return {part: pipeline.components[part].to("meta") for part in _builders(family)}


def _builders(family: str) -> dict[str, Build]:
    if family == "glm_image":
        from glm_training.models.glm_image.full_width import build_network as build

        parts = ("vision_language_encoder", "transformer", "vae", "text_encoder")
        return {part: partial(build, part) for part in parts}
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return {
        "unet": partial(_of_diffusers, UNet2DConditionModel),
        "vae": partial(_of_diffusers, AutoencoderKL),
        "text_encoder": partial(_of_transformers, CLIPTextModel, CLIPTextConfig),
        "text_encoder_2": partial(_of_transformers, CLIPTextModelWithProjection, CLIPTextConfig),
    }


def _of_diffusers(kind: Any, settings: dict[str, Any]) -> nn.Module:
    network: nn.Module = kind.from_config(settings)
    return network


def _of_transformers(kind: Any, config: Any, settings: dict[str, Any]) -> nn.Module:
    network: nn.Module = kind(config.from_dict(settings))
    return network
