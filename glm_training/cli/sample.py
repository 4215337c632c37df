"""`glm-train sample`: pictures from a model, a checkpoint's pipeline folder, or a base model with adapters."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG
from glm_training.data import DataError, load_image
from glm_training.models.glm_image.family import GLMImage, ModelLoadError
from glm_training.models.lora import load_lora
from glm_training.utils.console import Console
from glm_training.utils.pictures import save_image


def sample(arguments: argparse.Namespace) -> int:
    """Draws and writes `<prompt number>-<sample>.png`; 2 when an argument or file is at fault."""
    if arguments.source and len(arguments.source) != len(arguments.prompt):
        report_error(f"{len(arguments.source)} --source images for {len(arguments.prompt)} prompts: give one for each")
        return EXIT_CONFIG
    hide_progress_bars()
    try:
        family = _load(arguments)
        size = min(family.dit.vae.config["sample_size"], 1024)  # 128 for the tiny model and pipelines made from it
        height, width = arguments.height or size, arguments.width or size
        sources = [load_image(Path(path), height, width) for path in arguments.source]
        images = family.generate(
            arguments.prompt,
            height=height,
            width=width,
            sources=torch.stack(sources).to(family.dit.device) if sources else None,
            seed=arguments.seed,
            plans=arguments.samples,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
        )
    except (DataError, ModelLoadError, ValueError, FileNotFoundError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(images):
        number, plan = divmod(row, arguments.samples)
        save_image(folder / f"{number}-{plan}.png", image)
    Console().line(f"{len(images)} pictures in {folder}")
    return 0


def _load(arguments: argparse.Namespace) -> GLMImage:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" and arguments.model != "tiny" else "float32")
    family = GLMImage.load(arguments.model, dtype=getattr(torch, dtype), device=device)
    for entry in arguments.lora:
        half, _, folder = entry.partition("=")
        if half not in ("ar", "dit") or not folder:
            raise ValueError(f"--lora {entry}: write ar=FOLDER or dit=FOLDER")
        load_lora(family.ar.model if half == "ar" else family.dit.transformer, folder)
    return family.eval()
