"""GLM-Image with random weights in the shapes of the published one: nothing to download.

`build_published` makes it at a depth of choice. `model.name: full-width` is the one of `full_width_configuration`: the
published widths, heads, vocabulary and codebook, and 2 layers of each network, so that the shapes, token counts and
dtypes of a real run fit a CPU. What it draws means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformer2DModel
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
from torch import nn
from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

from glm_training.models.glm_image.tiny import (
    RANDOM_SHAPE,
    glm_scheduler,
    tiny_generation_config,
    tiny_processor,
)
from glm_training.models.loading import published_configuration

FULL_WIDTH = "full-width"
"""`model.name` of the one with few layers."""

LAYERS = 2

SHAPE = replace(
    RANDOM_SHAPE,
    codebook=16384,
    reserved=128,
    marks=(("<|pad|>", 167841), ("<sop>", 167845), ("<eop>", 167846), ("<|image|>", 167855)),
)
"""The ids of the published tokenizer, for the tiny model's: of its text there are bytes alone."""

Configure = Callable[[str], dict[str, Any]]
"""The configuration of a network, by the name of its folder."""


def published(part: str) -> dict[str, Any]:
    """The configuration of a network of zai-org/GLM-Image. The statistics of its latents are not published here: none
    are taken off."""
    settings = published_configuration("glm_image", part)
    if part == "vae":
        channels = settings["latent_channels"]
        settings |= {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return settings


def full_width_configuration(part: str) -> dict[str, Any]:
    """The published one with 2 layers; of the VAE, whose decoder has one residual block more than is written there, 2
    in each of the decoder's blocks."""
    settings = published(part)
    if part == "vision_language_encoder":
        settings["text_config"]["num_hidden_layers"] = settings["vision_config"]["depth"] = LAYERS
        return settings
    key, count = {"vae": ("layers_per_block", LAYERS - 1)}.get(part, ("num_layers", LAYERS))
    return settings | {key: count}


def build_network(part: str, settings: dict[str, Any]) -> nn.Module:
    """The network of a folder of the pipeline, from its configuration."""
    if part == "vision_language_encoder":
        return GlmImageForConditionalGeneration(GlmImageConfig.from_dict(settings))
    if part == "text_encoder":
        return T5EncoderModel(T5Config.from_dict(settings))
    kind: Any = {"transformer": GlmImageTransformer2DModel, "vae": AutoencoderKL}[part]
    network: nn.Module = kind.from_config(settings)
    return network


def random_network(
    part: str, configure: Configure, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Any:
    """A network made where it is to lie, with weights that depend on `seed` and the kind of device alone. Buffers keep
    their own type, as in what is read from files."""
    place, before = torch.device(device), torch.get_default_dtype()
    forked = [place] if place.type == "cuda" else []
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=forked), place:  # module constructors draw from the global generator
            torch.default_generator.manual_seed(seed)
            if forked:
                torch.cuda.manual_seed(seed)
            return build_network(part, configure(part)).eval()
    finally:
        torch.set_default_dtype(before)


def build_published(
    configure: Configure = published,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> GlmImagePipeline:
    """A whole pipeline, with the tiny model's tokenizers over the published ids."""
    networks = {
        part: random_network(part, configure, dtype=dtype, device=device, seed=seed)
        for part in ("vision_language_encoder", "text_encoder", "transformer", "vae")
    }
    processor = tiny_processor(SHAPE)
    networks["vision_language_encoder"].generation_config = tiny_generation_config(processor.tokenizer, SHAPE)
    return GlmImagePipeline(tokenizer=ByT5Tokenizer(), processor=processor, scheduler=glm_scheduler(), **networks)
