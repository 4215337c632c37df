"""Preference pairs as the losses read them: latents, tokens and texts, encoded once or at every step.

B pairs in B or 2 B rows, latents [C, h, w], T tokens.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from glm_training.config import Config
from glm_training.data.preference.dataset import (
    ImageRows,
    PairImage,
    PreferenceBatch,
    PreferenceDataset,
    PreferencePair,
    load_cropped,
    stack_rows,
)
from glm_training.engine.encoded_cache import EncodedCache, content_key
from glm_training.engine.families import Condition
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, barrier, gather_objects
from glm_training.utils.words import counted

READ_AHEAD = 4
"""Images that are decoded while one is encoded."""
TOLD_EVERY = 10.0
"""Seconds between lines on the progress of encoding."""

Encoded = dict[str, Tensor]
Job = Callable[[], int]
"""One pass of an encoder; gives how many items it encoded."""


@dataclass
class EncodedPairs:
    """B pairs in 2 B rows, the preferred of every pair, then the rejected; in SFT the B preferred alone.

    clean: [rows, C, h, w] fp32 latents, with the condition of each; None where no part denoises. tokens: [rows, T]
    long, what the AR half writes for these images, with its prompt; None where it is not trained.
    """

    pairs: list[PreferencePair]
    clean: Tensor | None = None
    condition: Condition | None = None
    tokens: Tensor | None = None
    prompt: ARPrompt | None = None


class PairEncoder(ABC):
    """From pairs to what their losses read, through the frozen parts of a family.

    An image that has changed since the start of the run is a DataError, never an entry under a name not its own.
    With `dpo.cache` every image and prompt is encoded once (`fill`) and the encoders then sleep on the CPU, but inside
    `awake`; an entry that is gone or damaged is made anew when it is met.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.digests: dict[PairImage, str] = {}  # of the data that `fill` was given
        self.size = config.data.image_size.height, config.data.image_size.width
        folder = config.encoded_cache_dir()
        self.cache = EncodedCache(folder) if config.dpo.cache else None
        self.rejected = config.dpo.loss == "dpo"
        self._facts: dict[str, str] = {}
        self._asleep = False

    # -- what a family says --------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_images(self, images: ImageRows) -> Encoded:
        """Tensors of as many rows, by name."""

    @abstractmethod
    def encode_texts(self, prompts: Sequence[str]) -> Encoded:
        """Tensors of as many rows, by name; none where texts are not encoded ahead."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """`image` and, where texts are encoded ahead, `text`: what the encoders of each are, weights included."""

    @abstractmethod
    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The texts that training on `prompts` needs."""

    @abstractmethod
    def sleepers(self) -> list[nn.Module]:
        """The modules that training steps do not use once everything is encoded."""

    @abstractmethod
    def assemble(self, pairs: list[PreferencePair], images: Encoded, drop: Tensor | None) -> EncodedPairs:
        """What the losses read, of encoded images (as many rows); where `drop` [B] bool is true, without the prompt."""

    # -- ahead of training ---------------------------------------------------------------------------------------------

    def fill(self, datasets: Sequence[PreferenceDataset], console: Console, on_step: Callable[[], None]) -> None:
        """Encodes all images and prompts of `datasets` that the cache lacks, shared out over the processes.

        `on_step` is called after each pass of an encoder, equally often on every process, and may raise: what was
        encoded is kept. Processes that share no disk encode all for themselves.
        """
        for dataset in datasets:
            self.digests |= dataset.image_digests()
        for dataset in datasets:
            dataset.expected |= self.digests
        if self.cache is None:
            return
        self._facts = self.fingerprints()
        pairs = [pair for dataset in datasets for pair in dataset.pairs]
        images = {self._image_key(image): image for image in self._images_of(pairs)}
        texts = {self._text_key(text): text for text in self.texts(list(dict.fromkeys(pair.prompt for pair in pairs)))}
        for rank, size in ((self.world.rank, self.world.world_size), (0, 1)):
            lacking = [key for key in (*images, *texts) if not self.cache.lists(key)]
            barrier(self.world)  # all have looked; from here on files appear
            mine = lacking[rank::size]
            if mine:
                counts = {
                    "image": sum(key in images for key in lacking),
                    "prompt": sum(key in texts for key in lacking),
                }
                what = " and ".join(counted(count, noun) for noun, count in counts.items() if count)
                console.line(f"encoding {what} once, into {self.cache.folder}")
            jobs = [*self._image_jobs([key for key in mine if key in images], images, datasets[0])]
            jobs += self._text_jobs([key for key in mine if key in texts], texts)
            self._run(jobs, len(mine), console, on_step)
        for dataset in datasets:
            dataset.decodes = False
        self.sleep()

    def _run(self, jobs: list[Job], total: int, console: Console, on_step: Callable[[], None]) -> None:
        progress = Progress(console, total)
        for number in range(max(gather_objects(self.world, len(jobs)))):
            if number < len(jobs):
                progress.add(jobs[number]())
            on_step()
        progress.finish()

    def _image_jobs(self, keys: list[str], images: dict[str, PairImage], loader: PreferenceDataset) -> Iterator[Job]:
        """One image at a time: what else is in a pass moves its last bits, and then two runs that share a folder, or
        one that was stopped and goes on, would not train on the same latents."""

        def job(number: int) -> int:
            rows = loader.load([images[keys[number]]])
            loader.read_ahead([images[key] for key in keys[number + 1 : number + 1 + READ_AHEAD]])
            self._put(keys[number : number + 1], self._with_sizes(rows))
            return 1

        yield from (partial(job, number) for number in range(len(keys)))

    def _text_jobs(self, keys: list[str], texts: dict[str, str]) -> Iterator[Job]:
        def job(key: str) -> int:
            self._put([key], self.encode_texts([texts[key]]))
            return 1

        yield from (partial(job, key) for key in keys)

    # -- in training ---------------------------------------------------------------------------------------------------

    def encode(self, batch: PreferenceBatch, drop: Tensor | None = None) -> EncodedPairs:
        """The batch as its losses read it, on the device; where `drop` [B] bool is true, without the prompt."""
        if batch.images is not None:
            wanted = len(self._images_of(batch.pairs))
            images = self._with_sizes(batch.images.first(wanted))
        else:
            images = self._images(self._images_of(batch.pairs))
        return self.assemble(batch.pairs, images, drop)

    def text_rows(self, texts: Sequence[str]) -> Encoded:
        """Encoded texts, in order, from the cache where there is one."""
        if self.cache is None:
            return self.encode_texts(texts)
        return self._looked_up([self._text_key(text) for text in texts], lambda row: self.encode_texts([texts[row]]))

    def _images_of(self, pairs: Sequence[PreferencePair]) -> list[PairImage]:
        """The rows of `pairs`: the preferred images, then the rejected ones where they are used."""
        return [pair.preferred for pair in pairs] + [pair.rejected for pair in pairs if self.rejected]

    def _images(self, images: list[PairImage]) -> Encoded:
        def anew(row: int) -> Encoded:
            image = images[row]
            return self._with_sizes(stack_rows([load_cropped(image, *self.size, digest=self.digests[image])]))

        return self._looked_up([self._image_key(image) for image in images], anew)

    def _looked_up(self, keys: list[str], anew: Callable[[int], Encoded]) -> Encoded:
        """The entries of `keys` as rows; those that are gone or damaged are made anew."""
        assert self.cache is not None
        entries = []
        for row, key in enumerate(keys):
            entry = self.cache.get(key)
            if entry is None:
                with self.awake():
                    made = anew(row)
                entry = self.cache.replace(key, {name: tensor[0] for name, tensor in made.items()})
            entries.append(entry)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]} if entries else {}

    def _with_sizes(self, images: ImageRows) -> Encoded:
        return {**self.encode_images(images), "original_sizes": images.original_sizes, "crops": images.crops}

    def _put(self, keys: list[str], rows: Encoded) -> None:
        assert self.cache is not None
        for row, key in enumerate(keys):
            self.cache.put(key, {name: tensor[row] for name, tensor in rows.items()})

    def _image_key(self, image: PairImage) -> str:
        return content_key(
            "image", image=self.digests[image], size=self.size, crop=self.config.dpo.crop, encoder=self._facts["image"]
        )

    def _text_key(self, text: str) -> str:
        return content_key("text", text=text, encoder=self._facts["text"])

    # -- where the encoders are ----------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """The encoders go to the CPU."""
        self._asleep = True
        self._move(torch.device("cpu"))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside, the encoders are on the device."""
        if not self._asleep:
            yield
            return
        self._asleep = False
        self._move(self.world.device)
        try:
            yield
        finally:
            self.sleep()

    def _move(self, device: torch.device) -> None:
        if self.world.device.type == "cpu":
            return
        for module in self.sleepers():
            module.to(device)
        if device.type == "cpu":
            torch.cuda.empty_cache()


class Progress:
    """Lines on how far this process is, at most one in `TOLD_EVERY` seconds; `verb` says with what."""

    def __init__(self, console: Console, total: int, verb: str = "encoded") -> None:
        self._console, self._total, self._verb, self._done = console, total, verb, 0
        self._started = self._told = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY:
            self._told = now
            left = (now - self._started) / self._done * (self._total - self._done)
            self._console.line(f"{self._verb} {self._done} of {self._total} of this process, about {left:.0f} s left")

    def finish(self) -> None:
        if self._done:
            self._console.line(f"{self._verb} {self._done} in {time.monotonic() - self._started:.1f} s")
