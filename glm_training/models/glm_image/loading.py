"""Where a GLM-Image comes from: the package's tiny ones, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import torch
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
from safetensors import SafetensorError

from glm_training.models.glm_image.tiny import TINY_FOLDER, build_tiny

_PARTS = ("tokenizer", "processor", "text_encoder", "vision_language_encoder", "vae", "transformer", "scheduler")


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message says from where, why, and what to do."""


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
        _check_folder(folder)
        return _load(folder, options, f"the folder {folder}")
    if _looks_like_path(name):
        raise ModelLoadError(f"model.name {name} is neither a folder here nor a hub id (owner/name): check the path")
    hub = {**options, "revision": revision, "local_files_only": local_files_only}
    remedy = (
        f"download it where there is a network (hf download {name}), then run again with "
        "model.local_files_only: true; or set model.name to a local folder with the checkpoint"
    )
    return _load(name, hub, f"{name} from the Hugging Face hub or its local cache", remedy)


def _load(source: str | Path, options: dict[str, Any], where: str, remedy: str = "") -> GlmImagePipeline:
    try:
        return GlmImagePipeline.from_pretrained(str(source), **options)
    except (OSError, ValueError, KeyError, SafetensorError, httpx2.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"cannot load {where}: {reason}" + (f"\nWhat to do: {remedy}" if remedy else "")
        ) from error


def _check_folder(folder: Path) -> None:
    """Name everything a GLM-Image folder lacks, before a loader trips over the first of them."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelLoadError(
            f"{folder} has no model_index.json: model.name must be a whole GLM-Image pipeline folder, like "
            "zai-org/GLM-Image or one that was exported here, not the folder of one component"
        )
    try:
        declared = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except ValueError as error:
        raise ModelLoadError(f"{index} is not valid JSON ({error}); copy or download it again") from error
    if declared != GlmImagePipeline.__name__:
        raise ModelLoadError(f"{index} declares a {declared}, not a {GlmImagePipeline.__name__}")
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise ModelLoadError(
            f"{folder} is incomplete: it lacks the folders {', '.join(missing)}; copy or download them again"
        )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name
