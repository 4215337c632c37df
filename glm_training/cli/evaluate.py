"""`glm-train evaluate`: a benchmark's pictures, what is said of them, and the figures."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from glm_training.cli.drawing_model import Choice, choose_model, how_to_draw, in_words_of_sample
from glm_training.cli.evaluation_arguments import SAMPLES
from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED
from glm_training.data import DataError
from glm_training.evaluation.reconstruction.inception import Inception
from glm_training.evaluation.reconstruction.suite import Originals, Reconstruction, Sizes, alexnet
from glm_training.evaluation.suites.answering import answerer
from glm_training.evaluation.suites.detectors import Detector, ShapesColors, ShapesDetector
from glm_training.evaluation.suites.drawing import Drawing, check_prompts, drawer
from glm_training.evaluation.suites.drawn_samples import SAMPLES as SAMPLES_FILE
from glm_training.evaluation.suites.drawn_samples import samples_each, taking_samples
from glm_training.evaluation.suites.files import digest, read_settings
from glm_training.evaluation.suites.protocol import EvaluationError, Maker, Suite
from glm_training.evaluation.suites.results import table
from glm_training.evaluation.suites.services import HttpDetector
from glm_training.evaluation.suites.stages import Place, generate, judge, score, together
from glm_training.evaluation.suites.vision_models import ClipColors, TransformersDetector
from glm_training.models.loading import ModelLoadError
from glm_training.rewards.types import RewardError
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, init_world, shutdown
from glm_training.utils.folder_lock import FolderInUseError, FolderLock
from glm_training.utils.launch import DistributedError
from glm_training.utils.writable import expanded, why_unwritable

_USERS_FAULTS = (
    EvaluationError, DataError, ModelLoadError, RewardError, ValueError, FileNotFoundError,
)  # fmt: skip


_JUDGES_NOTHING = ("generate", "score")
"""Stages that need no judge: any will do, and is asked nothing. Figures name the one that made the records."""


def evaluate(arguments: argparse.Namespace) -> int:
    """Runs the stages that are asked for; 2 when an argument, a file or a server is at fault, 1 when a disk is."""
    hide_progress_bars()
    try:
        world = init_world(enabled=True, backend=None)
    except DistributedError as error:
        report_error(str(error))
        return EXIT_CONFIG
    try:
        with ExitStack() as stack:
            _run(arguments, world, stack)
    except _USERS_FAULTS as error:
        report_error(in_words_of_sample(str(error)))
        return EXIT_CONFIG
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        report_error(f"out of memory: {first} What is drawn stays; give a smaller --at-once, which another --out needs")
        return EXIT_FAILED
    except OSError as error:
        report_error(f"--out {arguments.out}: {error.strerror or error}")
        return EXIT_FAILED
    finally:
        shutdown(world)
    return 0


def _run(arguments: argparse.Namespace, world: World, stack: ExitStack) -> None:
    images = None if arguments.images is None else expanded(arguments.images)
    samples = images if images is not None and (images / SAMPLES_FILE).is_file() else None
    place = Place(expanded(arguments.out), None if samples is not None else images)
    _check_places(place, arguments.stage, samples)
    suite = _suite(arguments, samples)
    stages = (arguments.stage,) if arguments.stage else ("generate", "judge", "score")
    if "judge" in stages and place.images is None:  # before hours of drawing
        suite.check_judge()
    together(world, lambda: _lock(place.out, stack), main_only=True)
    console = Console(world.is_main)
    if "generate" in stages and place.images is None:
        if samples is None:
            _generate(arguments, suite, place, world, console)
        else:
            make, settings = together(world, lambda: taking_samples(samples, suite))
            generate(suite, make, settings, place, world, at_once=arguments.at_once, doing="copying")
    if "judge" in stages:
        judge(suite, place, world)
    if "score" in stages:
        scores = score(suite, place, world)
        if scores is not None:
            for line in table(suite.name, scores, read_settings(place.out).get("judge", {}).get("judge", "nobody")):
                console.line(line)
            console.line(f"{place.out / 'results.json'} has everything")
    elif world.is_main:
        console.line(f"{' and '.join(stages)} done in {place.out}")


def _lock(out: Path, stack: ExitStack) -> None:
    lock = FolderLock(out)
    try:
        lock.acquire()
    except FolderInUseError as error:
        raise EvaluationError(str(error)) from error
    stack.callback(lock.release)


def _generate(arguments: argparse.Namespace, suite: Suite, place: Place, world: World, console: Console) -> None:
    """In a function of its own: the model that draws is gone when the judge is loaded."""
    make, settings, at_once = together(world, lambda: _maker(arguments, suite, world, console))
    generate(suite, make, settings, place, world, at_once=at_once)


def _check_places(place: Place, stage: str | None, samples: Path | None) -> None:
    if samples is not None and samples.resolve() == place.out.resolve():
        raise EvaluationError("--images and --out are the same folder: give --out another one")
    if place.images is not None:
        if stage == "generate":
            raise EvaluationError(
                "--stage generate draws pictures, and --images has them already: leave one of them out"
            )
        if not place.images.is_dir():
            raise EvaluationError(f"--images {place.images} is no folder")
        if place.images.resolve() == place.out.resolve():
            raise EvaluationError("--images and --out are the same folder: give --out another one")
    problem = why_unwritable(place.out)
    if problem is not None:
        raise EvaluationError(f"--out: {problem}")


def _suite(arguments: argparse.Namespace, samples: Path | None) -> Suite:
    if samples is not None and arguments.prompts is None:
        raise EvaluationError(f"--images {samples} has samples.jsonl: give the benchmark's --prompts that were drawn")
    if arguments.samples is None:
        asked = SAMPLES[arguments.suite]
        arguments.samples = asked if samples is None else max(1, min(asked, samples_each(samples)))
        if arguments.suite == "dpg" and arguments.samples < asked:
            arguments.samples = 1  # its pictures are grids of four, or one
    makers = {"geneval": _geneval, "dpg": _dpg, "text": _text, "reconstruction": _reconstruction}
    return makers[arguments.suite](arguments)


def _geneval(arguments: argparse.Namespace) -> Suite:
    from glm_training.evaluation.suites.geneval.prompts import SOURCE, read_prompts
    from glm_training.evaluation.suites.geneval.suite import GenEval

    if arguments.prompts is None and arguments.images is None:
        raise EvaluationError(f"--suite geneval needs --prompts. {SOURCE}")
    spec = arguments.detector
    if spec is None and arguments.stage in _JUDGES_NOTHING:
        spec = "shapes"
    if spec is None:
        raise EvaluationError(
            "--suite geneval needs --detector: transformers:facebook/mask2former-swin-small-coco-instance is nearest "
            "to the published one; shapes is for the tiny model"
        )
    prompts = None if arguments.prompts is None else read_prompts(expanded(arguments.prompts))
    colors = arguments.colors or ("shapes" if spec == "shapes" else "openai/clip-vit-large-patch14")
    detector = _detector(spec, arguments.token_variable)
    return GenEval(prompts, arguments.samples, detector, ShapesColors() if colors == "shapes" else ClipColors(colors))


def _dpg(arguments: argparse.Namespace) -> Suite:
    from glm_training.evaluation.suites.dpg.questions import SOURCE, read_prompts, read_questions
    from glm_training.evaluation.suites.dpg.suite import DPG

    if arguments.prompts is None and arguments.images is None:
        raise EvaluationError(f"--suite dpg needs --prompts. {SOURCE}")
    if arguments.questions is None:
        raise EvaluationError(f"--suite dpg needs --questions. {SOURCE}")
    spec = arguments.judge
    if spec is None and arguments.stage in _JUDGES_NOTHING:
        spec = "shapes"
    if spec is None:
        raise EvaluationError(
            "--suite dpg needs --judge: the published one is mPLUG-large, which a service of yours can be "
            "(http://host:port); transformers:MODEL, openai:MODEL@http://host:port/v1, or shapes for the tiny model"
        )
    prompts = None if arguments.prompts is None else read_prompts(expanded(arguments.prompts))
    questions = read_questions(expanded(arguments.questions))
    return DPG(prompts, questions, arguments.samples, answerer(spec, arguments.token_variable))


def _detector(spec: str, token: str | None) -> Detector:
    kind, _, model = spec.partition(":")
    if spec == "shapes":
        return ShapesDetector()
    if kind == "transformers" and model:
        return TransformersDetector(model)
    if kind in ("http", "https"):
        return HttpDetector(spec, token=token)
    raise EvaluationError(f"--detector {spec}: write transformers:MODEL, http://host:port or shapes")


def _text(arguments: argparse.Namespace) -> Suite:
    from glm_training.evaluation.text.prompts import SOURCE, read_prompts
    from glm_training.evaluation.text.readers import reader
    from glm_training.evaluation.text.suite import ClipScorer, TextSuite

    if arguments.prompts is None:
        raise EvaluationError(f"--suite text needs --prompts. {SOURCE}")
    prompts = read_prompts(expanded(arguments.prompts))
    clip = None if arguments.clip is None else ClipScorer(arguments.clip)
    return TextSuite(
        prompts, arguments.samples, reader(arguments.reader, prompts.language, arguments.token_variable), clip
    )


def _reconstruction(arguments: argparse.Namespace) -> Suite:
    if arguments.originals is None:
        raise EvaluationError(
            "--suite reconstruction needs --originals: a folder of pictures, or webdataset tars; published figures are "
            "of ImageNet's 50,000 for validation"
        )
    inception, weights = (None if path is None else expanded(path) for path in (arguments.inception, arguments.alexnet))
    return Reconstruction(
        Originals(expanded(arguments.originals), arguments.first),
        Sizes(arguments.size, arguments.compare_at),
        None if arguments.no_rfid else Inception(inception),
        None if arguments.no_lpips else alexnet(weights),
    )


def _maker(
    arguments: argparse.Namespace, suite: Suite, world: World, console: Console
) -> tuple[Maker, dict[str, Any], int]:
    """Who draws, the settings that decide the pictures, and how many files are drawn together."""
    choice = together(world, lambda: _chosen(arguments), main_only=True)
    for note in choice.notes:
        console.line(note)
    family = choice.load(world.device)
    settings = choice.described(family)
    if isinstance(suite, Reconstruction):
        return suite.maker(family.reconstruct), settings | suite.drawing_settings, arguments.at_once
    sampling = how_to_draw(arguments, family, choice.kind)
    size = family.own_size()
    drawing = Drawing(arguments.height or size, arguments.width or size, arguments.seed, sampling)
    pictures = suite.pictures()
    for note in check_prompts(family, pictures, drawing)[:20]:
        console.line(f"note: the model does not read all of {note}")
    settings |= {
        "prompts": digest([(picture.path, picture.prompt) for picture in pictures]),
        "samples": arguments.samples,
        **drawing.settings(),
    }
    rows = len(pictures[0].samples)
    return drawer(family, drawing), settings, max(1, arguments.at_once // rows)


def _chosen(arguments: argparse.Namespace) -> Choice:
    try:
        return choose_model(arguments)
    except (ModelLoadError, FileNotFoundError) as error:  # which `together` passes on to the other processes
        raise EvaluationError(str(error)) from error
