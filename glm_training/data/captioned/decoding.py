"""A sample of captioned pictures, from its file's bytes to a row of a batch."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image

from glm_training.data.captioned.samples import BadSample, Encoded, Fault, ImageSet
from glm_training.data.dataset import is_flipped, may_flip
from glm_training.data.examples import View
from glm_training.data.pictures.buckets import Buckets, Size
from glm_training.data.pictures.images import CroppedImage, decode_image, fitted
from glm_training.data.pictures.picture_size import upright_size
from glm_training.data.problems import DataError
from glm_training.data.prompt_lengths import PromptReader
from glm_training.utils.randomness import uniform

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class Captioning:
    """How captions become prompts.

    Attributes:
        trigger_word: goes before each caption that does not hold it, and is the caption of a picture without one.
        dropout: share of what is drawn whose prompt is empty, in [0, 1].
    """

    trigger_word: str | None = None
    dropout: float = 0.0

    def prompt(self, caption: str | None) -> str:
        """The caption with the trigger word. It is held as a word of its own, in the same case: `sks` is not in
        `asks`, and `TOK` is not `tok` to a tokenizer."""
        if self.trigger_word is None or re.search(rf"(?<!\w){re.escape(self.trigger_word)}(?!\w)", caption or "", re.A):
            return caption or ""
        return f"{self.trigger_word}, {caption}" if caption else self.trigger_word

    def is_dropped(self, seed: int, epoch: int, index: int) -> bool:
        """Whether the sample drawn at `index` in an epoch has an empty prompt: the same on every process, and after
        every resume."""
        return self.dropout > 0 and uniform(seed, "caption dropout", [(epoch, index)], (1,)).item() < self.dropout


@dataclass(frozen=True)
class Shaping:
    """How pictures become rows of a batch.

    Attributes:
        height, width: pixels. A picture is resized (Lanczos) to cover them, and the overhang is cut off.
        crop: where it is cut: evenly at both sides, or anywhere.
        flip: mirror about half of the pictures; never one that :func:`may_flip` rules out by its caption.
        min_side: a picture whose shorter side is not longer than this is left out.
        max_aspect: one whose longer side is more than this many times the shorter is left out.
        buckets: say the height and width of each picture, in place of those; one that has no bucket is left out.
    """

    height: int
    width: int
    crop: Crop = "center"
    flip: bool = False
    min_side: int = 80
    max_aspect: float = 10.0
    buckets: Buckets | None = None

    def unsuitable(self, size: Size) -> tuple[str, str] | None:
        """Why a whole picture of upright (height, width) is left out, and what to do to use it; None where it is
        not."""
        short, long = sorted(size)
        reason = f"has {size[1]} x {size[0]} pixels"
        if short <= self.min_side:
            return reason, f"Lower data.min_side ({self.min_side}) to use it; if all are so small, data.image_size too"
        if long > self.max_aspect * short:
            return reason, f"Raise data.max_aspect ({self.max_aspect:g}) to use it"
        if self.buckets is not None and self.buckets.size(size) is None:
            return self.buckets.why_none(size)
        return None


@dataclass(frozen=True)
class Decoded:
    """Upright RGB pictures in their own sizes, what is drawn and what it was edited from (None without sources), and
    the prompt."""

    image: Image.Image
    source: Image.Image | None
    prompt: str


@dataclass(frozen=True)
class Drawn:
    """A row of a batch: its prompt, empty where that was dropped, its pictures cut to one size (None where they are not
    decoded), and as what they are shown, where that is known."""

    prompt: str
    target: CroppedImage | None
    source: CroppedImage | None
    target_view: View | None = None
    source_view: View | None = None


class SampleDecoder:
    """Decodes and cuts, in several threads at once. `reader`: says whether the model can take a prompt; None leaves
    that open."""

    def __init__(self, shaping: Shaping, captioning: Captioning, reader: PromptReader | None, seed: int) -> None:
        self._shaping = shaping
        self._captioning = captioning
        self._reader = reader
        self._seed = seed
        self._reading = threading.Lock()  # tokenizers are lent to one thread at a time

    def decoded(self, one: ImageSet, row: int) -> Decoded:
        """The sample of a set; raises BadSample."""
        sample = one.read(row)
        image = _image(one, row, sample.image)
        source = None if sample.source is None else _image(one, row, sample.source)
        self._check_size(one, row, (image.height, image.width))
        buckets = self._shaping.buckets
        if source is not None and buckets is not None:  # which is not enlarged either
            shape = source.height, source.width
            if buckets.size((image.height, image.width), shape) is None:
                raise BadSample(Fault(*one.where(row), *buckets.why_none(shape), unsuitable=True))
        return Decoded(image, source, self.prompt(one, row, sample))

    def check_shape(self, one: ImageSet, row: int, sample: Encoded) -> None:
        """Raises BadSample for a picture of a shape that is left out, as its header says."""
        size = upright_size(Path(one.name), partial(one.part, row), lambda: sample.image)
        self._check_size(one, row, size)

    def _check_size(self, one: ImageSet, row: int, size: Size) -> None:
        unsuitable = self._shaping.unsuitable(size)
        if unsuitable is not None:
            raise BadSample(Fault(*one.where(row), *unsuitable, unsuitable=True))

    def prompt(self, one: ImageSet, row: int, sample: Encoded) -> str:
        """What the model is told; raises BadSample where it cannot take that."""
        prompt = "" if sample.caption is None else self._captioning.prompt(sample.caption)
        if self._reader is not None and prompt:
            with self._reading:
                fault = self._reader([prompt])[0].fault
            if fault is not None:
                raise BadSample(Fault(*one.where(row), *fault))
        return prompt

    def is_mirrored(self, prompt: str, index: int, epoch: int) -> bool:
        return self._shaping.flip and may_flip(prompt) and is_flipped(self._seed, epoch, index)

    def shown_prompt(self, prompt: str, index: int, epoch: int) -> str:
        """The prompt, or none where it is left out."""
        return "" if self._captioning.is_dropped(self._seed, epoch, index) else prompt

    def drawn(self, sample: Decoded, size: Size, index: int, epoch: int) -> Drawn:
        """The sample as it is drawn at `index` in an epoch: both pictures are cut to (height, width) at the same place,
        and mirrored together."""
        shaping = self._shaping
        place = (0.5, 0.5)
        if shaping.crop == "random":
            left, top = uniform(self._seed, "captioned crop", [(epoch, index)], (2,))[0].tolist()
            place = (top, left)
        mirrored = self.is_mirrored(sample.prompt, index, epoch)
        target, source = (
            None if image is None else fitted(image, *size, place, mirrored=mirrored)
            for image in (sample.image, sample.source)
        )
        return Drawn(self.shown_prompt(sample.prompt, index, epoch), target, source)


def _image(one: ImageSet, row: int, data: bytes) -> Image.Image:
    try:
        return decode_image(Path(one.name), data)
    except DataError as error:
        problem = error.problems[0]
        raise BadSample(Fault(*one.where(row), problem.reason, problem.remedy)) from error
