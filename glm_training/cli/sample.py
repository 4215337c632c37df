"""`glm-train sample`: pictures from a model, a checkpoint's pipeline folder, or a base model with adapters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG
from glm_training.data import DataError, load_image
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.sdxl.family import SDXL
from glm_training.utils.console import Console
from glm_training.utils.pictures import save_image

GUIDANCE = {"glm_image": 1.5, "sdxl": 5.0}
"""The stock pipelines' guidance, and their number of steps."""

STEPS = 50


def sample(arguments: argparse.Namespace) -> int:
    """Draws and writes `<prompt number>-<sample>.png`; 2 when an argument or file is at fault."""
    if arguments.source and len(arguments.source) != len(arguments.prompt):
        report_error(f"{len(arguments.source)} --source images for {len(arguments.prompt)} prompts: give one for each")
        return EXIT_CONFIG
    hide_progress_bars()
    kind = arguments.family or family_of(arguments.model)
    try:
        family = _load(arguments, kind)
        steps, guidance = _how(arguments, family, kind)
        size = family.own_size()
        height, width = arguments.height or size, arguments.width or size
        sources = [load_image(Path(path), height, width) for path in arguments.source]
        images = family.draw(
            arguments.prompt,
            height=height,
            width=width,
            seed=arguments.seed,
            sampling=Sampling(arguments.temperature, arguments.top_p, True, steps, guidance),
            samples=arguments.samples,
            sources=torch.stack(sources).to(family.component(family.components[0]).device) if sources else None,
        )
    except (DataError, ModelLoadError, ValueError, FileNotFoundError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(images):
        number, drawn = divmod(row, arguments.samples)
        save_image(folder / f"{number}-{drawn}.png", image)
    Console().line(f"{len(images)} pictures in {folder}")
    return 0


def _how(arguments: argparse.Namespace, family: Family, kind: str) -> tuple[int, float]:
    """Steps and guidance: as asked for, or as the model was distilled, or the stock pipeline's."""
    few = family.few_steps
    steps, guidance = (STEPS, GUIDANCE[kind]) if few is None else (few.steps, 1.0)
    return arguments.steps or steps, guidance if arguments.guidance is None else arguments.guidance


def family_of(model: str) -> str:
    """The family that a pipeline folder's model_index.json names; GLM-Image for any other model."""
    index = Path(model) / "model_index.json"
    if not index.is_file():
        return "glm_image"
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "glm_image"  # whose loading says what is wrong with the file
    return "sdxl" if str(name).startswith("StableDiffusionXL") else "glm_image"


def _load(arguments: argparse.Namespace, kind: str) -> Family:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" and arguments.model != "tiny" else "float32")
    loader = SDXL if kind == "sdxl" else GLMImage
    family: Family = loader.load(arguments.model, dtype=getattr(torch, dtype), device=device)
    for entry in arguments.lora:
        name, _, folder = entry.partition("=")
        if name not in family.components or not folder:
            raise ValueError(f"--lora {entry}: write {' or '.join(f'{part}=FOLDER' for part in family.components)}")
        family.load_lora(name, folder)
    return family.eval()
