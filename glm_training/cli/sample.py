"""`glm-train sample`: pictures from a model, a checkpoint's pipeline folder, or a base model with adapters."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from glm_training.cli.drawing_model import choose_model, how_to_draw, in_words_of_sample
from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED
from glm_training.data import DataError, load_image
from glm_training.data.text_lines import text_fault
from glm_training.models.loading import ModelLoadError
from glm_training.models.prompt_reading import shortened
from glm_training.utils.console import Console
from glm_training.utils.pictures import save_image
from glm_training.utils.words import counted
from glm_training.utils.writable import expanded, why_unwritable

AT_ONCE = 8
"""Pictures drawn together, which bounds the memory."""


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


def _draw(arguments: argparse.Namespace) -> Tensor:
    choice = choose_model(arguments)
    for note in choice.notes:
        Console().line(note)
    family = choice.load()
    sampling = how_to_draw(arguments, family, choice.kind)
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
