"""Pictures and texts encoded ahead of training, once, and looked up in it; the encoders sleep meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch

from glm_training.config import Config
from glm_training.data.examples import ImageRows, View
from glm_training.engine.encoding.cache import EncodedCache, content_key
from glm_training.engine.encoding.encoder import Encoded, FrozenEncoder, Kind
from glm_training.engine.errors import TrainingError
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, barrier, gather_objects
from glm_training.utils.words import counted

READ_AHEAD = 4
"""Pictures that are decoded while one is encoded."""
TOLD_EVERY = 10.0
"""Seconds between lines on the progress of encoding."""

Load = Callable[[View], ImageRows]
"""Decodes one picture, one row; raises DataError where it is gone, or is another by now."""
Job = Callable[[], None]
"""One pass of an encoder."""


class Encoding:
    """What a family's frozen parts give of pictures and texts, each alone, the same bits with and without a cache.

    With `cache.enabled` every picture and text is encoded once (`fill`), and the encoders then sleep on the CPU, but
    inside `awake`; an entry that is gone or damaged is made anew when it is met. `pictures` False: they are cut
    anew in each epoch, and only texts are kept.
    """

    def __init__(self, config: Config, world: World, encoder: FrozenEncoder, *, pictures: bool = True) -> None:
        self.world = world
        self.encoder = encoder
        self.cache = EncodedCache(config.encoded_cache_dir()) if config.caches() else None
        self.keeps_pictures = self.cache is not None and pictures
        self._threads = config.data.num_workers
        self._facts: dict[Kind, str] = {}
        self._telling = threading.Lock()
        self._filled = False
        self._loads: Mapping[View, Load] = {}
        self._asleep = False
        encoder.serve(self.text)

    # -- ahead of training ---------------------------------------------------------------------------------------------

    def fill(
        self, pictures: Mapping[View, Load], prompts: Sequence[str], console: Console, on_step: Callable[[], None]
    ) -> None:
        """Encodes what the cache lacks of `pictures`, each with what decodes it, and of the texts of `prompts`, shared
        out over the processes; the encoders then sleep.

        `on_step` is called after each pass of an encoder, equally often on every process, and may raise: what was
        encoded is kept. Processes that share no disk encode all for themselves. Raises TrainingError, on every process,
        where the disk has no room.
        """
        if self.cache is None:
            return
        self._filled = True
        self._loads = pictures if self.keeps_pictures else {}
        views = {self.picture_key(view): view for view in pictures} if self.keeps_pictures else {}
        texts = {self.text_key(text): text for text in self.encoder.texts(prompts)}
        for rank, size in ((self.world.rank, self.world.world_size), (0, 1)):
            new_views = {key: view for key, view in views.items() if not self.cache.lists(key)}
            new_texts = {key: text for key, text in texts.items() if not self.cache.lists(key)}
            self._check_room(new_views.values(), new_texts.values())
            barrier(self.world)  # all have looked; from here on files appear
            keys = [*new_views, *new_texts][rank::size]
            if keys:
                counts = {"image": len(new_views), self.encoder.text_noun: len(new_texts)}
                what = " and ".join(counted(count, noun) for noun, count in counts.items() if count)
                console.line(f"encoding {what} once, into {self.cache.folder}")
            own = {key: new_views[key] for key in keys if key in new_views}
            with ReadAhead([partial(pictures[view], view) for view in own.values()], self._threads) as ahead:
                jobs = [partial(self._put_picture, key, partial(ahead.take, row)) for row, key in enumerate(own)]
                jobs += [partial(self._put_text, key, new_texts[key]) for key in keys if key in new_texts]
                self._run(jobs, console, on_step)
        self.sleep()

    def expect_room(self, sample: Sequence[View], share: float) -> None:
        """Raises TrainingError, on every process, where the disk has no room for what is to be expected of pictures of
        which `sample` is that share."""
        lacking = [self.encoder.picture_bytes(*view.size) for view in sample if not self.is_encoded(view)]
        self._refuse(int(sum(lacking) / share), f"what encoders give of about {round(len(lacking) / share)} images")

    def _check_room(self, views: Iterable[View], texts: Iterable[str]) -> None:
        sizes = [self.encoder.picture_bytes(*view.size) for view in views]
        wanted = sum(sizes) + sum(map(self.encoder.text_bytes, texts))
        self._refuse(wanted, f"what encoders give of {counted(len(sizes), 'image')}")

    def _refuse(self, wanted: int, what: str) -> None:
        assert self.cache is not None
        problem = None
        try:
            self.cache.check_room(wanted, what)
        except TrainingError as error:
            problem = str(error)
        for told in gather_objects(self.world, problem):
            if told is not None:
                raise TrainingError(told)

    def _run(self, jobs: Sequence[Job], console: Console, on_step: Callable[[], None]) -> None:
        progress = Progress(console, len(jobs))
        for number in range(max(gather_objects(self.world, len(jobs)))):
            if number < len(jobs):
                jobs[number]()
                progress.add(1)
            on_step()
        progress.finish()

    def _put_picture(self, key: str, load: Callable[[], ImageRows]) -> None:
        assert self.cache is not None
        self.cache.put(key, self.encode(load()))

    def _put_text(self, key: str, text: str) -> None:
        assert self.cache is not None
        self.cache.put(key, self.encoder.text(text))

    # -- in training ---------------------------------------------------------------------------------------------------

    def encode(self, row: ImageRows) -> Encoded:
        """One picture's tensors by name, without a row dimension, with its sizes and its crop."""
        found = self.encoder.picture(row.pixels)
        return {**found, "original_sizes": row.original_sizes[0], "crops": row.crops[0]}

    def alone(self, rows: ImageRows) -> Encoded:
        """Rows of pictures, each encoded alone."""
        with self.awake():
            return _stacked([self.encode(rows.rows(slice(row, row + 1))) for row in range(len(rows))])

    def shown(self, views: Sequence[View] | None, rows: ImageRows | None) -> Encoded:
        """Pictures as rows: the entries of their `views`, where `fill` was given those, else of their own pixels. An
        entry that is gone or damaged is made anew."""
        if views is not None and all(view in self._loads for view in views):
            return _stacked([self._picture(view) for view in views])
        if rows is None:
            raise ValueError("pictures that were not encoded ahead must bring their pixels")
        return self.alone(rows)

    def _picture(self, view: View) -> Encoded:
        return self._found(self.picture_key(view), lambda: self.encode(self._loads[view](view)))

    def text(self, text: str) -> Encoded:
        """One text's tensors, from the cache where there is one."""
        if self.cache is None or not self._filled:
            return self.encoder.text(text)
        return self._found(self.text_key(text), lambda: self.encoder.text(text))

    def text_rows(self, texts: Sequence[str]) -> Encoded:
        """Texts of one shape as rows."""
        return _stacked([self.text(text) for text in texts])

    def _found(self, key: str, anew: Callable[[], Encoded]) -> Encoded:
        assert self.cache is not None
        entry = self.cache.get(key)
        if entry is None:
            with self.awake():
                made = anew()
            entry = self.cache.replace(key, made)
        return entry

    def picture_key(self, view: View) -> str:
        """The name of a picture's entry: its content, how it is shown, and what encodes it."""
        mirrored = {"flipped": True} if view.flipped else {}
        return content_key(
            "image", image=view.digest, size=view.size, crop="center", encoder=self._fact("image"), **mirrored
        )

    def text_key(self, text: str) -> str:
        """The name of a text's entry."""
        return content_key("text", text=text, encoder=self._fact("text"))

    def _fact(self, kind: Kind) -> str:
        """What encodes, told once: it reads all its weights."""
        with self._telling:  # threads that read pictures ask for it too
            if kind not in self._facts:
                self._facts[kind] = self.encoder.fingerprint(kind)
            return self._facts[kind]

    def is_encoded(self, view: View) -> bool:
        """Whether nobody needs to decode the picture: there is an entry for it, or pictures are not kept at all."""
        return not self.keeps_pictures or (self.cache is not None and self.cache.lists(self.picture_key(view)))

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
        for module in self.encoder.sleepers(pictures=self.keeps_pictures):
            module.to(device)
        if device.type == "cpu":
            torch.cuda.empty_cache()


def _stacked(entries: Sequence[Encoded]) -> Encoded:
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]} if entries else {}


class ReadAhead:
    """What `loads` give, taken in their order; the next few run in `threads` meanwhile, with 0 none does."""

    def __init__(self, loads: Sequence[Callable[[], ImageRows]], threads: int) -> None:
        self._loads = loads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 0 and loads else None
        self._pending: dict[int, Future[ImageRows]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> ImageRows:
        if self._pool is None:
            return self._loads[number]()
        for coming in range(number, min(number + 1 + READ_AHEAD, len(self._loads))):
            if coming not in self._pending:
                self._pending[coming] = self._pool.submit(self._loads[coming])
        return self._pending.pop(number).result()


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
