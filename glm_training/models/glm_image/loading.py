"""Where a GLM-Image comes from: the package's own, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformer2DModel
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from glm_training.models.family import read_few_steps
from glm_training.models.glm_image.full_width import (
    FULL_WIDTH,
    build_network,
    build_published,
    full_width_configuration,
)
from glm_training.models.glm_image.schedule import check_scheduler
from glm_training.models.glm_image.tiny import TINY_FOLDER, build_tiny
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
from glm_training.models.weights import cast_weights
from glm_training.utils.writable import expanded

__all__ = ["ModelLoadError", "check_source", "load_pipeline", "load_skeleton"]

logger = logging.getLogger(__name__)

NETWORKS = {"ar": "vision_language_encoder", "dit": "transformer"}
"""Folder of a pipeline in which each component's trained network lies."""

KIND = PipelineKind(
    "GLM-Image",
    "zai-org/GLM-Image",
    ("GlmImagePipeline",),
    ("tokenizer", "processor", "text_encoder", "vision_language_encoder", "vae", "transformer", "scheduler"),
    ("text_encoder", "vision_language_encoder", "vae", "transformer"),
)


def check_source(name: str) -> None:
    """Everything that can be known of a model before its weights are read. Raises ModelLoadError, saying what to do.

    Of a hub id that is nothing yet: `loading.fetch_parts` asks for it.
    """
    if name in ("tiny-random", FULL_WIDTH):
        return
    folder = TINY_FOLDER if name == "tiny" else expanded(name)
    if name == "tiny" and not folder.is_dir():
        raise ModelLoadError(
            f"the trained tiny model is not in this installation ({folder} does not exist); reinstall the package, "
            "make it with examples/tiny_glm_image/train.py, or set model.name: tiny-random for random weights"
        )
    if folder.is_dir():
        check_pipeline_folder(folder, KIND)
        with load_errors_explained(f"the folder {folder}"):
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder / "scheduler"))
        try:
            check_scheduler(scheduler)
            read_few_steps(folder)
        except ValueError as error:
            raise ModelLoadError(f"cannot use {folder} as a GLM-Image: {error}") from error
    elif looks_like_path(name):
        raise ModelLoadError(f"model.name {name} is neither a folder here nor a hub id (owner/name): check the path")


def load_pipeline(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    local_files_only: bool = False,
    seed: int = 0,
) -> GlmImagePipeline:
    """The stock pipeline of "tiny", "tiny-random" or "full-width" (weights from `seed`), a local folder, or a hub id.

    Only safetensors weights are read and no code from the checkpoint runs. Raises ModelLoadError.
    """
    name = str(name_or_path)
    check_source(name)
    if name == "tiny-random":
        pipeline: Any = build_tiny(seed=seed)
        for part in (pipeline.text_encoder, pipeline.vision_language_encoder, pipeline.vae, pipeline.transformer):
            cast_weights(part, dtype)
        return pipeline
    if name == FULL_WIDTH:
        logger.warning("%s has random weights: it is for trying shapes, time and memory, and draws noise", name)
        return build_published(full_width_configuration, dtype=dtype, seed=seed)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    folder = TINY_FOLDER if name == "tiny" else expanded(name)
    if folder.is_dir():
        with load_errors_explained(f"the folder {folder}"):
            return GlmImagePipeline.from_pretrained(str(folder), **options)
    hub = hub_options(name, "model_index.json", revision=revision, local_files_only=local_files_only)
    check_hub_class(name, hub, KIND.classes)
    options |= hub
    with load_errors_explained(f"{name} from the Hugging Face hub or its local cache", hub_remedy(name)):
        return GlmImagePipeline.from_pretrained(name, **options)


def load_skeleton(name: str, component: str, revision: str | None = None) -> nn.Module | None:
    """The trained network of a component on the meta device, from its configuration; None for a hub id whose
    configuration is not in the local cache. Raises ModelLoadError for one that cannot be read."""
    if name == "tiny-random":
        with torch.device("meta"):
            pipeline: Any = build_tiny()
        return pipeline.vision_language_encoder if component == "ar" else pipeline.transformer  # type: ignore[no-any-return]
    part = NETWORKS[component]
    if name == FULL_WIDTH:
        with torch.device("meta"):
            return build_network(part, full_width_configuration(part))
    folder = TINY_FOLDER if name == "tiny" else parts_at_hand(name, [part], revision)
    if folder is None:
        return None
    with load_errors_explained(f"the configuration in {folder / part}"), torch.device("meta"):
        if component == "ar":
            return GlmImageForConditionalGeneration(GlmImageConfig.from_pretrained(str(folder / part)))
        config: Any = GlmImageTransformer2DModel.load_config(str(folder / part))
        return GlmImageTransformer2DModel.from_config(config)  # type: ignore[no-any-return]
