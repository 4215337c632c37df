"""`glm-train data`: what a run would be trained on, as it was understood, before any of it."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm_training.cli.messages import report_error
from glm_training.cli.training import EXIT_CONFIG
from glm_training.config import Config, ConfigError, load_config
from glm_training.utils.words import counted

if TYPE_CHECKING:
    from glm_training.data import ImageDataset, PromptReader, TrainingData
    from glm_training.data.captioned.dataset import CaptionedImages
    from glm_training.data.captioned.samples import Fault
    from glm_training.data.captioned.survey import Seen, Survey

WIDTH = 80
_INDENT = 10
SHOWN = 5
SHEET = 24
"""Pictures on the contact sheet."""

_SIZES = 16
_TOLD_EVERY = 10.0
"""Seconds."""


def data(paths: list[str], overrides: list[str], mode: str | None) -> int:
    """Tells what the data of a configuration are; 0, or 2 where a run would not start on them."""
    try:
        config = load_config(paths, overrides, mode=mode)
    except ConfigError as error:
        report_error(str(error))
        return EXIT_CONFIG
    from glm_training.engine.errors import USER_ERRORS

    try:
        return _of_prompts(config) if config.data.images is None else _of_pictures(config)
    except USER_ERRORS as error:
        report_error(str(error))
        return EXIT_CONFIG


def _say(label: str, *texts: str) -> None:
    """Lines under a label, within the width but for paths that are longer."""
    from glm_training.utils.console import Console

    parts = [part for text in texts for part in text.splitlines()]
    for number, text in enumerate(parts):
        head = label.ljust(_INDENT) if number == 0 else " " * _INDENT
        lines = textwrap.wrap(
            text, WIDTH, initial_indent=head, subsequent_indent=" " * _INDENT, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        for line in lines:
            Console().line(line)


# -- prompts and pairs -------------------------------------------------------------------------------------------------


def _of_prompts(config: Config) -> int:
    """Of `data.prompts_file`, `metadata_file` or `pairs`, which are scanned whole as before a run."""
    from glm_training.data import ImageDataset
    from glm_training.engine import setup
    from glm_training.trainers.run import trainer_type

    training, held_out = trainer_type(config).build_data(config)
    _say("data", str(config.dataset_file()), *setup.data_told(config, training, held_out))
    prompts = [example.prompt for example in (training if isinstance(training, ImageDataset) else held_out).examples]
    _tell_lengths(prompts)
    _say("notes", *training.remarks)
    targets = _targets(training)
    if targets is not None:
        _tell_sheet(config, *targets)
    return 0


def _targets(training: TrainingData | ImageDataset) -> tuple[list[object], list[str]] | None:
    from glm_training.data import ImageDataset

    if not isinstance(training, ImageDataset) or not training.has_targets:
        return None
    rows = range(min(SHEET, len(training)))
    batches = [training.batch([row]) for row in rows]
    return [batch.targets[0] for batch in batches if batch.targets is not None], [batch.prompts[0] for batch in batches]


# -- own pictures ------------------------------------------------------------------------------------------------------


def _of_pictures(config: Config) -> int:
    from glm_training.data.captioned.survey import survey
    from glm_training.engine import setup
    from glm_training.engine.captioned_setup import every_picture

    captions = config.model.component != "autoencoder"
    reader = _reader(config) if captions else None
    pictures = every_picture(config, captions=captions, reader=reader, tolerant=True)
    found = survey(pictures, threads=config.data.num_workers, tell=_Progress())
    for one in pictures.sets:
        label = "set" if len(pictures.sets) > 1 else "data"
        _say(label, one.name, f"{counted(len(one), 'picture')}, read as {one.layout}")
    code = _tell_held_out(config, pictures, found)
    if found.looked_at < len(pictures):
        _say("looked at", f"{found.looked_at} pictures, evenly spread over all: what follows is of those")
    _tell_sizes(found)
    if captions and found.seen:
        prompts = [one.prompt for one in found.seen]
        _tell_lengths(prompts)
        _tell_read([setup.unread(config)] if reader is None else _read_whole(found.seen, reader))
    _tell_copies(found, several=len(pictures.sets) > 1)
    _say("notes", *(remark for one in pictures.sets for remark in one.remarks))
    code = max(code, _tell_faults(config, found))
    step = max(1, len(found.seen) // SHEET)
    shown = found.seen[::step][:SHEET]
    batches = [pictures.batch([one.index]) for one in shown]
    if shown:
        images = [batch.targets[0] for batch in batches if batch.targets is not None]
        _tell_sheet(config, images, [f"{one.name}: {one.prompt}" for one in shown])
    return code


class _Progress:
    """A line now and then on how far the survey is."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._told >= _TOLD_EVERY:
            self._told = time.monotonic()
            _say("", f"looked at {done} of {total} pictures")


def _reader(config: Config) -> PromptReader | None:
    """What tells how much the model reads of a prompt; None where its files are not to be had, which is no fault of the
    data."""
    from glm_training.engine.families import fetch_small_files, prompt_reader
    from glm_training.models.loading import ModelLoadError

    try:
        fetch_small_files(config)
    except ModelLoadError as error:
        _say("model", str(error))
    try:
        return prompt_reader(config)
    except ModelLoadError:
        return None


def _tell_held_out(config: Config, pictures: CaptionedImages, found: Survey) -> int:
    """Which pictures are held out; the exit code."""
    from glm_training.data import DataError
    from glm_training.data.captioned.split import hold_out

    share = config.data.validation
    if not share or not found.seen:
        if config.evaluation.eval_images is not None:
            _say("held out", str(config.evaluation.eval_images))
        return 0
    if len(pictures) > found.looked_at:
        _say("held out", f"a share of {share:g}, by content (data.validation): the run reads all pictures for that")
        return 0
    try:
        _, apart = hold_out(pictures, share, threads=config.data.num_workers)
    except DataError as error:
        _say("held out", str(error))
        return EXIT_CONFIG
    places = [one.where(row) for one in apart for row in range(len(one))]
    held = [_place_name(place, len(pictures.sets) > 1, both=True) for place in places]
    _say("held out", f"{len(held)} of {found.total} (data.validation {share:g}): {_some(held)}")
    return 0


def _place_name(place: tuple[Path, str], several: bool, *, both: bool = False) -> str:
    """The name of a sample in its file, or with that (`both`); of `several` sets with the way there, since files of
    them may be called alike."""
    path, key = place
    file = str(path) if several else path.name
    if not key:
        return file
    return f"{file}: {key}" if several or both else key


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _tell_sizes(found: Survey) -> None:
    from glm_training.utils.console import Console

    if not found.seen:
        return
    shapes = sorted((one.shape for one in found.seen), key=lambda shape: shape[0] * shape[1])
    least, most = (f"{width} x {height}" for height, width in (shapes[0], shapes[-1]))
    _say("sizes", f"{least} to {most} px; in training (width x height):")
    rows = []
    groups = list(found.by_size().items())
    for (height, width), group in groups[:_SIZES]:
        enlarged = [one.scale for one in group if one.scale > 1]
        told = f"{len(enlarged)}, up to {max(enlarged):.2f} x" if enlarged else "none"
        rows.append([f"{width} x {height}", len(group), told, f"{max(one.cut for one in group):.0%}"])
    if len(groups) > _SIZES:
        rest = [one for _, group in groups[_SIZES:] for one in group]
        rows.append([f"{len(groups) - _SIZES} others", len(rest), "", f"{max(one.cut for one in rest):.0%}"])
    Console().table("", ["size", "pictures", "enlarged", "cut off at most"], rows)
    Console().line()


def _tell_lengths(prompts: Sequence[str]) -> None:
    from glm_training.data.captioned.survey import words_of

    if not prompts:
        return
    lengths = list(words_of(prompts))
    longest = prompts[lengths.index(max(lengths))]
    told = f"{min(lengths)} to {max(lengths)} words, half of them {statistics.median(lengths):g} or fewer"
    alike = len(prompts) - len(set(prompts))
    empty = prompts.count("")
    texts = [told, f"the longest: {textwrap.shorten(longest, 200, placeholder=' ...')}"]
    texts += [f"{alike} repeat another's"] if alike else []
    texts += [f"{empty} are empty"] if empty else []
    _say("captions", *texts)


def _read_whole(seen: Sequence[Seen], reader: PromptReader) -> list[str]:
    prompts = list(dict.fromkeys(one.prompt for one in seen))
    cut = [reading.cut for reading in reader(prompts) if reading.cut is not None]
    if not cut:
        return ["the model reads all of them whole"]
    return [f"the model does not read all of {counted(len(cut), 'prompt')}:", *cut[:SHOWN]]


def _tell_read(texts: Iterable[str]) -> None:
    _say("", *texts)


def _tell_copies(found: Survey, *, several: bool) -> None:
    copies = found.copies()
    if copies:
        count = sum(len(alike) - 1 for alike in copies)
        _say("copies", f"{counted(count, 'picture')} the same as another, byte for byte:", *_pairs(copies, several))


def _pairs(copies: Sequence[Sequence[Seen]], several: bool) -> Iterator[str]:
    for alike in copies[:SHOWN]:
        yield " = ".join(_place_name(one.place, several) for one in alike[:4]) + (" ..." if len(alike) > 4 else "")


def _tell_faults(config: Config, found: Survey) -> int:
    """Says what cannot be used; the exit code."""
    if found.unsuitable:
        _say(
            "left out",
            f"{counted(len(found.unsuitable), 'picture')}, too small or too long:",
            *_first(found.unsuitable),
        )
    if not found.broken:
        _say("faults", "none" if found.seen else "no picture is left to train on: a run does not start")
        return 0 if found.seen else EXIT_CONFIG
    stops = len(found.broken) > config.data.max_bad_fraction * found.total
    what = "a run stops at these" if stops else "left out, as data.max_bad_fraction allows"
    _say("faults", f"{len(found.broken)} of {found.total}: {what}", *_first(found.broken))
    return EXIT_CONFIG if stops or not found.seen else 0


def _first(faults: Sequence[Fault]) -> list[str]:
    """As many as an error of a run shows."""
    from glm_training.data.problems import SHOWN_PROBLEMS

    more = [f"and {len(faults) - SHOWN_PROBLEMS} more"] if len(faults) > SHOWN_PROBLEMS else []
    return [str(fault.problem()) for fault in faults[:SHOWN_PROBLEMS]] + more


def _tell_sheet(config: Config, images: Sequence[object], labels: Sequence[str]) -> None:
    from glm_training.utils.pictures import save_sheet

    folder = config.output_dir / "data"
    try:
        path = _free(folder)
        save_sheet(path, images, labels)  # type: ignore[arg-type]
    except OSError as error:
        _say("sheet", f"not written to {folder}: {error.strerror or error}")
        return
    _say("sheet", str(path))


def _free(folder: Path) -> Path:
    """A name for the sheet that nothing has yet."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"contact_sheet-{number}.png" if number > 1 else "contact_sheet.png")
        if not path.exists():
            return path
        number += 1
