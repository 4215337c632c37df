"""`glm-train sample`: pictures from a model, a checkpoint's pipeline folder, or a base model with adapters."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED
from glm_training.data import DataError, load_image
from glm_training.data.text_lines import text_fault
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.prompt_reading import shortened
from glm_training.models.run_folders import adapter_in, pipeline_in
from glm_training.models.sdxl.family import SDXL
from glm_training.models.vgt.family import VGT
from glm_training.utils.console import Console
from glm_training.utils.pictures import save_image
from glm_training.utils.words import counted
from glm_training.utils.writable import expanded, why_unwritable

GUIDANCE = {"glm_image": 1.5, "sdxl": 5.0, "vgt": 4.5}
STEPS = {"glm_image": 50, "sdxl": 50, "vgt": 30}
"""What the stock pipelines and VGT's authors draw with."""

CLASS_NAMES = {"StableDiffusionXL": "sdxl", "VGT": "vgt"}
"""How the class that a model_index.json names begins -> the family; any other is a GLM-Image."""

AT_ONCE = 8
"""Pictures drawn together, which bounds the memory."""

IN_WORDS_OF_SAMPLE = (
    ("model.local_files_only: true", "HF_HUB_OFFLINE=1"),
    ("model.local_files_only is set", "HF_HUB_OFFLINE=1 is set"),
    ("model.family (--family of sample)", "--family"),
    ("model.name: ", "--model "),
    ("model.name", "--model"),
    ("model.taesd", "the pipeline's TAESD"),
)
"""Keys of a configuration in the messages of loaders -> what this command has in their place."""


def sample(arguments: argparse.Namespace) -> int:
    """Draws and writes `<number>-<sample>.png`, numbers going on after those in the folder; 2 when an argument or file
    is at fault."""
    if arguments.source and len(arguments.source) != len(arguments.prompt):
        report_error(
            f"{counted(len(arguments.source), '--source image')} for {counted(len(arguments.prompt), 'prompt')}: "
            "give one for each"
        )
        return EXIT_CONFIG
    for number, prompt in enumerate(arguments.prompt):
        fault = text_fault(prompt, number)
        if fault is not None:
            report_error(f"--prompt {shortened(prompt)!r}: {'. '.join(fault)}")
            return EXIT_CONFIG
    folder = expanded(arguments.out)
    problem = why_unwritable(folder)
    if problem is not None:
        report_error(f"--out: {problem}")
        return EXIT_CONFIG
    hide_progress_bars()
    try:
        images = _draw(arguments)
    except (DataError, ModelLoadError, ValueError, FileNotFoundError) as error:
        report_error(in_words_of_sample(str(error)))
        return EXIT_CONFIG
    try:
        names = _write(folder, images, arguments.samples)
    except OSError as error:
        report_error(f"--out: {folder}: {error.strerror or error}")
        return EXIT_FAILED
    Console().line(
        f"{counted(len(images), 'picture')} in {folder}: {names[0]}" + (f" to {names[-1]}" if names[1:] else "")
    )
    return 0


def in_words_of_sample(message: str) -> str:
    """`message` of a loader, which speaks of a configuration's keys, with this command's options in their place."""
    for key, option in IN_WORDS_OF_SAMPLE:
        message = message.replace(key, option)
    return message


def _draw(arguments: argparse.Namespace) -> Tensor:
    arguments.model = pipeline_in(arguments.model, "--model")
    kind = arguments.family or family_of(arguments.model)
    family = load_model(arguments, kind)
    sampling = how_to_draw(arguments, family, kind)
    size = family.own_size()
    height, width = arguments.height or size, arguments.width or size
    for prompt, reading in zip(
        arguments.prompt,
        family.read_prompts(arguments.prompt, height, width, "i2i" if arguments.source else "t2i"),
        strict=True,
    ):
        if reading.fault is not None:
            raise ValueError(f"--prompt {shortened(prompt)!r}: {'. '.join(reading.fault)}")
        if reading.cut is not None:
            Console().line(f"note: the model does not read all of --prompt {shortened(prompt)!r}: {reading.cut}")
    sources = [load_image(Path(path), height, width) for path in arguments.source]
    return family.draw(
        arguments.prompt,
        height=height,
        width=width,
        seed=arguments.seed,
        sampling=sampling,
        samples=arguments.samples,
        sources=torch.stack(sources).to(family.component(family.components[0]).device) if sources else None,
        micro_batch_size=AT_ONCE,
    )


def _write(folder: Path, images: Tensor, samples: int) -> list[str]:
    """Writes the pictures, prompt-major, under numbers that are free; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(found[1]) for path in folder.iterdir() if (found := re.match(r"(\d+)-", path.name))]
    first = max(taken, default=-1) + 1
    names = []
    for row, image in enumerate(images):
        number, drawn = divmod(row, samples)
        names.append(f"{first + number}-{drawn}.png")
        save_image(folder / names[-1], image)
    return names


def how_to_draw(arguments: argparse.Namespace, family: Family, kind: str) -> Sampling:
    """Steps and guidance: as asked for, or as the model was distilled, or the stock pipeline's. Raises ValueError for
    an option that the family has no use for."""
    if arguments.parallel is not None and kind != "vgt":
        raise ValueError("--parallel is for VGT: other models draw whole images at once")
    few = family.few_steps
    steps, guidance = (STEPS[kind], GUIDANCE[kind]) if few is None else (few.steps, 1.0)
    return Sampling(
        arguments.temperature,
        arguments.top_p,
        True,
        arguments.steps or steps,
        guidance if arguments.guidance is None else arguments.guidance,
        arguments.parallel or 1,
    )


def family_of(model: str) -> str:
    """The family that a pipeline folder's model_index.json names; GLM-Image for any other model."""
    index = Path(model) / "model_index.json"
    if not index.is_file():
        return "glm_image"
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "glm_image"  # whose loading says what is wrong with the file
    return next((family for start, family in CLASS_NAMES.items() if str(name).startswith(start)), "glm_image")


def load_model(arguments: argparse.Namespace, kind: str, device: torch.device | None = None) -> Family:
    """The model of a `kind` (a family's name) with its adapters, on `device` (the GPU where there is one).

    Raises ModelLoadError, ValueError or FileNotFoundError, in words of a configuration (`in_words_of_sample`).
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" and arguments.model != "tiny" else "float32")
    loaders: dict[str, type[GLMImage | SDXL | VGT]] = {"glm_image": GLMImage, "sdxl": SDXL, "vgt": VGT}
    family: Family = loaders[kind].load(arguments.model, dtype=getattr(torch, dtype), device=device)
    for entry in arguments.lora:
        name, _, folder = entry.partition("=")
        if name not in family.components or not folder:
            raise ValueError(f"--lora {entry}: write {' or '.join(f'{part}=FOLDER' for part in family.components)}")
        family.load_lora(name, adapter_in(folder, name))
    return family.eval()
