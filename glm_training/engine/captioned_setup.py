"""From a configuration to sets of captioned pictures, to train and to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from glm_training.config import Config
from glm_training.data import ImageDataset
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.decoding import Captioning
from glm_training.data.captioned.held_out import HeldOutImages
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import HASHED_CAPTIONS, ImageSet
from glm_training.data.captioned.split import hold_out
from glm_training.data.prompt_lengths import PromptReader
from glm_training.engine import setup
from glm_training.engine.families import prompt_reader
from glm_training.utils.console import Console
from glm_training.utils.launch import read_launch
from glm_training.utils.words import counted


def build_captioned(config: Config, *, captions: bool) -> CaptionedImages:
    """The training data of `data.images`. `captions`: whether the model is told what it sees; else pictures alone do.

    Raises DataError with every problem that can be known without reading every picture.
    """
    data, launch = config.data, read_launch()
    assert data.images is not None  # the check of the configuration says so
    reader = prompt_reader(config) if captions else None
    every = every_picture(config, captions=captions, reader=reader)
    sets: Sequence[ImageSet] = every.sets
    apart: Sequence[ImageSet] = ()
    if data.validation:
        if len(every) > HASHED_CAPTIONS:
            told = (
                f"reading {counted(len(every), 'picture')}, of which {data.validation:g} are held out (data.validation)"
            )
            Console(enabled=launch.rank == 0).line(told)
        sets, apart = hold_out(every, data.validation, threads=data.num_workers)
    weights = [one.weight for one in data.images if one.weight is not None]
    pictures = CaptionedImages(
        sets,
        every.shaping,
        repeats=[one.repeats for one in data.images],
        weights=weights or None,
        seed=config.seed,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
        max_bad_fraction=data.max_bad_fraction,
        skipped_dir=config.output_dir,
        rank=launch.rank,
        reader=reader,
        apart=apart,
        measure=True,
        captioning=Captioning(data.trigger_word, data.caption_dropout),
        sources=every.sources,
    )
    if apart:
        held, total = sum(map(len, apart)), sum(map(len, [*apart, *sets]))
        judged = min(held, config.evaluation.num_eval_samples)
        pictures.remarks.append(
            f"{held} of {counted(total, 'picture')} held out (data.validation {data.validation:g}), of which {judged} "
            "are judged (evaluation.num_eval_samples)"
        )
    return pictures


def every_picture(
    config: Config, *, captions: bool, reader: PromptReader | None, tolerant: bool = False
) -> CaptionedImages:
    """All of `data.images`, held-out ones too, each once; no picture is read here. `tolerant`: all of them may be
    broken. Raises DataError."""
    data = config.data
    assert data.images is not None
    options = [
        SetOptions(one.path, one.weight, one.repeats, cap_source=one.cap_source, root=one.root, split=one.split)
        for one in data.images
    ]
    # the held-out set is opened here as well, so that what is wrong with either is told together
    sets = open_sets([*options, *_held_out(config)], _reading(config, captions))[: len(options)]
    size = data.image_size
    return CaptionedImages(
        sets,
        Shaping(
            size.height,
            size.width,
            data.crop,
            data.augmentation,
            data.min_side,
            data.max_aspect,
            buckets=setup.buckets(config),
        ),
        seed=config.seed,
        max_bad_fraction=1.0 if tolerant else data.max_bad_fraction,
        try_first=0,
        reader=reader,
        captioning=Captioning(data.trigger_word),
        sources=config.training.mode == "i2i",
    )


def build_captioned_training(config: Config) -> tuple[CaptionedImages, ImageDataset]:
    """The training data of `data.images`, and what is drawn and judged in evaluations: held-out pictures with their
    captions, or the prompts of `evaluation.eval_prompts_file` where it is given. Raises DataError."""
    training = build_captioned(config, captions=True)
    if config.evaluation.eval_prompts_file is not None:
        return training, setup.build_evaluation_dataset(config, training)
    return training, build_held_out_images(config, training, captions=True)


def build_held_out_images(
    config: Config, training: CaptionedImages, *, captions: bool, as_sources: bool = False
) -> HeldOutImages:
    """The first `evaluation.num_eval_samples` pictures of `evaluation.eval_images`, or without of the training data;
    `as_sources`: as what is drawn again.

    Pictures of `eval_images` are taken at any size; of the training data only such as are trained on, those that
    `data.validation` holds out where there are any.
    Raises DataError.
    """
    size, own, buckets = config.data.image_size, _held_out(config), setup.buckets(config)
    if not own:
        sets = list(training.apart or training.sets)
        least, longest = config.data.min_side, config.data.max_aspect
        shaping = Shaping(size.height, size.width, min_side=least, max_aspect=longest, buckets=buckets)
    else:
        sets = open_sets(own, _reading(config, captions))
        shaping = Shaping(size.height, size.width, min_side=0, max_aspect=inf, buckets=buckets)
    pictures = CaptionedImages(
        sets,
        shaping,
        num_workers=config.data.num_workers,
        max_bad_fraction=config.data.max_bad_fraction,
        try_first=0,
        reader=prompt_reader(config) if own and captions else None,
        captioning=Captioning(config.data.trigger_word),
        sources=training.sources,
    )
    count, threads = config.evaluation.num_eval_samples, config.data.num_workers
    held_out = HeldOutImages(pictures, count, num_workers=threads, as_sources=as_sources)
    if not own:
        held_out.remarks = []  # the training data tell them
    return held_out


def _held_out(config: Config) -> list[SetOptions]:
    """The set of `evaluation.eval_images`, whose captions lie under the key of the first training set."""
    path, images = config.evaluation.eval_images, config.data.images
    return [] if path is None else [SetOptions(path, cap_source=images[0].cap_source if images else None)]


def _reading(config: Config, captions: bool) -> Reading:
    launch = read_launch()
    tell = Console(enabled=launch.rank == 0).line
    return Reading(
        captions,
        config.index_dir(),
        config.data.num_workers,
        launch.rank,
        launch.world_size,
        optional=config.data.trigger_word is not None,
        sources=config.training.mode == "i2i",
        local_files_only=config.model.local_files_only,
        tell=tell,
    )
