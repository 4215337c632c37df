"""Where a GLM-Image comes from: the package's tiny ones, a local folder, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline

from glm_training.models.glm_image.tiny import TINY_FOLDER, build_tiny
from glm_training.models.loading import (
    ModelLoadError,
    check_hub_class,
    check_pipeline_folder,
    hub_options,
    hub_remedy,
    load_errors_explained,
    looks_like_path,
)

__all__ = ["ModelLoadError", "load_pipeline"]

_CLASSES = ("GlmImagePipeline",)
_PARTS = ("tokenizer", "processor", "text_encoder", "vision_language_encoder", "vae", "transformer", "scheduler")


def load_pipeline(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    local_files_only: bool = False,
    seed: int = 0,
) -> GlmImagePipeline:
    """The stock pipeline of "tiny", "tiny-random" (weights from `seed`), a local folder, or a hub id.

    Only safetensors weights are read and no code from the checkpoint runs. Raises ModelLoadError.
    """
    name = str(name_or_path)
    if name == "tiny-random":
        pipeline: Any = build_tiny(seed=seed)
        for part in (pipeline.text_encoder, pipeline.vision_language_encoder, pipeline.vae, pipeline.transformer):
            torch.nn.Module.to(part, dtype)
        return pipeline
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    folder = TINY_FOLDER if name == "tiny" else Path(name).expanduser()
    if name == "tiny" and not folder.is_dir():
        raise ModelLoadError(
            f"the trained tiny model is not in this installation ({folder} does not exist); reinstall the package, "
            "make it with examples/tiny_glm_image/train.py, or set model.name: tiny-random for random weights"
        )
    if folder.is_dir():
        check_pipeline_folder(folder, "GLM-Image", "zai-org/GLM-Image", [GlmImagePipeline.__name__], _PARTS)
        with load_errors_explained(f"the folder {folder}"):
            return GlmImagePipeline.from_pretrained(str(folder), **options)
    if looks_like_path(name):
        raise ModelLoadError(f"model.name {name} is neither a folder here nor a hub id (owner/name): check the path")
    hub = hub_options(name, "model_index.json", revision=revision, local_files_only=local_files_only)
    check_hub_class(name, hub, _CLASSES)
    options |= hub
    with load_errors_explained(f"{name} from the Hugging Face hub or its local cache", hub_remedy(name)):
        return GlmImagePipeline.from_pretrained(name, **options)
