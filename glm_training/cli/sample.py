"""`glm-train sample`: pictures from a model, a run, a checkpoint, or a model with adapters."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glm_training.cli.drawing_model import Choice, choose_model, how_to_draw, in_words_of_sample
from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.sample_folder import SampleFolder, Wanted
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED
from glm_training.data import DataError, Problem, load_image
from glm_training.data.prompts_to_draw import PromptToDraw, prompts_to_draw, with_numbered_sources
from glm_training.data.text_lines import text_fault
from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.models.family import Family, Sampling
from glm_training.models.loading import ModelLoadError
from glm_training.models.prompt_reading import shortened
from glm_training.utils.console import Console
from glm_training.utils.folder_lock import FolderInUseError, FolderLock
from glm_training.utils.pictures import to_pil
from glm_training.utils.words import counted
from glm_training.utils.writable import expanded, why_unwritable

AT_ONCE = 8
"""Pictures drawn together, which bounds the memory."""

_USERS_FAULTS = (DataError, ModelLoadError, EvaluationError, ValueError, FileNotFoundError, FolderInUseError)


@dataclass(frozen=True)
class Drawing:
    """Pixels, seed and the numbers of the sampling; plans of a prompt and renders of a plan."""

    height: int
    width: int
    seed: int
    plans: int
    renders: int
    sampling: Sampling

    def settings(self) -> dict[str, Any]:
        """All that decides a picture; how many of a prompt there are does not."""
        sampling = asdict(self.sampling)
        return {"seed": self.seed, "height": self.height, "width": self.width, **sampling}


def sample(arguments: argparse.Namespace) -> int:
    """Draws what is not in the folder yet; 2 when an argument or file is at fault, 1 when a disk is or the memory."""
    folder = expanded(arguments.out)
    problem = why_unwritable(folder)
    if problem is not None:
        report_error(f"--out: {problem}")
        return EXIT_CONFIG
    hide_progress_bars()
    try:
        with ExitStack() as stack:
            _sample(arguments, folder, stack)
    except _USERS_FAULTS as error:
        report_error(in_words_of_sample(str(error)))
        return EXIT_CONFIG
    except torch.OutOfMemoryError as error:
        report_error(
            f"out of memory: {str(error).splitlines()[0]} What is drawn stays; give a smaller --height, --width"
        )
        return EXIT_FAILED
    except OSError as error:
        report_error(f"{error.filename or f'--out: {folder}'}: {error.strerror or error}")
        return EXIT_FAILED
    return 0


def _sample(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    asked = _asked(arguments)
    choice = choose_model(arguments)
    console = Console()
    for note in choice.notes:
        console.line(note)
    family = choice.load()
    drawing = _drawing(arguments, family, choice)
    for note in _check_prompts(asked, family, drawing):
        console.line(note)
    lock = FolderLock(folder)
    stack.callback(lock.release)
    lock.acquire()
    settings = {**choice.described(family), **drawing.settings()}
    kept = SampleFolder(folder, settings, drawing.plans, drawing.renders)
    wanted = kept.wanted(asked)
    drawn = draw_missing(kept, wanted, family, drawing, console)
    grids = kept.write_grids(wanted)
    names = [wanted[0].file, *([wanted[-1].file] if len(wanted) > 1 else [])]
    there = "" if drawn == len(wanted) else f", of which {len(wanted) - drawn} {_were(len(wanted) - drawn)} there"
    console.line(f"{counted(len(wanted), 'picture')} in {folder}: {' to '.join(names)}{there}")
    if grids:
        console.line(f"all of them: {', '.join(path.name for path in grids)}")


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _asked(arguments: argparse.Namespace) -> list[PromptToDraw]:
    """The prompts with what they edit. Raises DataError and ValueError, before a model is loaded."""
    if arguments.prompts is None:
        for number, prompt in enumerate(arguments.prompt):
            fault = text_fault(prompt, number)
            if fault is not None:
                raise ValueError(f"--prompt {shortened(prompt)!r}: {'. '.join(fault)}")
        asked = [PromptToDraw(number, prompt) for number, prompt in enumerate(arguments.prompt)]
    else:
        asked = prompts_to_draw(expanded(arguments.prompts))
    sources = [expanded(source) for source in arguments.source]
    if not sources:
        return asked
    if any(each.source is not None for each in asked):
        raise ValueError(f"--image: the records of {arguments.prompts} name pictures to edit already")
    if len(sources) == 1 and sources[0].is_dir():
        return with_numbered_sources(asked, sources[0])
    if len(sources) not in (1, len(asked)):
        raise ValueError(
            f"--image is given {counted(len(sources), 'time')} for {counted(len(asked), 'prompt')}: give one for each, "
            "one for all, or a folder of pictures that are numbered as the prompts are"
        )
    every = sources * len(asked) if len(sources) == 1 else sources
    return [replace(each, source=source) for each, source in zip(asked, every, strict=True)]


def _drawing(arguments: argparse.Namespace, family: Family, choice: Choice) -> Drawing:
    """Raises ValueError for options that the family has no use for."""
    plans, renders = arguments.plans, arguments.renders
    if choice.kind != "glm_image" and (plans is not None or renders is not None):
        raise ValueError("--plans and --renders are for GLM-Image, which plans first: give --samples")
    if arguments.samples is not None and plans is not None:
        raise ValueError("--samples and --plans are the same of a GLM-Image: give one of them")
    size = family.own_size()
    return Drawing(
        arguments.height or size,
        arguments.width or size,
        arguments.seed,
        plans or arguments.samples or 1,
        renders or 1,
        how_to_draw(arguments, family, choice.kind),
    )


def _check_prompts(asked: Sequence[PromptToDraw], family: Family, drawing: Drawing) -> list[str]:
    """What the model does not read of the prompts, a line each. Raises ValueError, with all that it cannot draw, and
    DataError for a picture that cannot be read."""
    edits = asked[0].source is not None
    texts = list(dict.fromkeys(each.prompt for each in asked))
    readings = family.read_prompts(texts, drawing.height, drawing.width, "i2i" if edits else "t2i")
    faults = [
        f"--prompt {shortened(text)!r}: {'. '.join(reading.fault)}"
        for text, reading in zip(texts, readings, strict=True)
        if reading.fault is not None
    ]
    if faults:
        raise ValueError("\n".join(faults))
    problems = list[Problem]()
    for path in {each.source: None for each in asked if each.source is not None}:
        try:
            load_image(path, drawing.height, drawing.width)  # all of them before the first is edited
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return [
        f"note: the model does not read all of --prompt {shortened(text)!r}: {reading.cut}"
        for text, reading in zip(texts, readings, strict=True)
        if reading.cut is not None
    ]


def draw_missing(
    kept: SampleFolder, wanted: Sequence[Wanted], family: Family, drawing: Drawing, console: Console
) -> int:
    """Draws and keeps what is not there, and says how many that were: prompts in groups that are always the same, since
    the numbers of a batched model depend on how many are drawn together by a rounding."""
    each = drawing.plans * drawing.renders
    step = max(1, AT_ONCE // each) * each
    groups = [wanted[start : start + step] for start in range(0, len(wanted), step)]
    left = [group for group in groups if not all(map(kept.is_there, group))]
    drawn = 0
    with console.progress(len(left), every=max(1, len(left) // 20)) as progress:
        for number, group in enumerate(left, start=1):
            images = _draw(group[::each], family, drawing)
            missing = [place for place, picture in enumerate(group) if not kept.is_there(picture)]
            kept.keep([group[place] for place in missing], [to_pil(images[place]) for place in missing])
            drawn += len(missing)
            progress.update(number, {})
    return drawn


def _draw(first: Sequence[Wanted], family: Family, drawing: Drawing) -> torch.Tensor:
    """The pictures of some prompts, of each of which the `first` is given."""
    asked = [each.asked for each in first]
    sources = [load_image(each.source, drawing.height, drawing.width) for each in asked if each.source is not None]
    draw: Callable[..., torch.Tensor] = family.draw
    return draw(
        [each.prompt for each in asked],
        height=drawing.height,
        width=drawing.width,
        seed=drawing.seed,
        sampling=drawing.sampling,
        samples=drawing.plans,
        prompt_ids=[each.index for each in asked],
        sources=torch.stack(sources).to(family.component(family.components[0]).device) if sources else None,
        micro_batch_size=AT_ONCE,
        **({"renders": drawing.renders} if drawing.renders > 1 else {}),
    )
