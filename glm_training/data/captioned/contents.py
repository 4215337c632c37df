"""Captioned pictures by their content: which of them batches show, under names that do not change with their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from glm_training.data.captioned.decoding import SampleDecoder
from glm_training.data.captioned.samples import BadSample, ImageSet
from glm_training.data.dataset import may_flip
from glm_training.data.examples import ImageRows, View
from glm_training.data.pictures.buckets import Size
from glm_training.data.pictures.images import decode_image, fitted, to_unit_range
from glm_training.data.problems import DataError, Problem

Place = tuple[int, int]
"""Number of the set, and row in it."""

IsEncoded = Callable[[View], bool]


@dataclass(frozen=True)
class Content:
    """A sample's prompt, SHA-256 (hex) of its picture and of what that was edited from, and their size in a batch."""

    prompt: str
    target: str
    source: str | None
    size: Size

    def views(self, mirrored: bool) -> tuple[View, View | None]:
        """Both pictures as a batch shows them."""
        source = None if self.source is None else View(self.source, self.size, mirrored)
        return View(self.target, self.size, mirrored), source


class SampleContents:
    """What was learnt of the samples of some sets from reading each once. `flip`: batches mirror those that may be."""

    def __init__(self, sets: Sequence[ImageSet], decoder: SampleDecoder, *, flip: bool) -> None:
        self._sets = tuple(sets)
        self._decoder = decoder
        self._flip = flip
        self._known: dict[Place, Content] = {}
        self._where: dict[str, tuple[Place, bool]] = {}

    def read(
        self,
        samples: Iterable[tuple[Place, Size]],
        is_encoded: IsEncoded,
        threads: int,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        """Reads samples, each with the size of its pictures. Those that cannot be used are left out; what `is_encoded`
        knows already has been decoded once, and is not again. `on_read` is called after each, and may raise."""
        wanted = list(samples)
        pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode")
        try:
            found = pool.map(lambda one: self._read(one[0], one[1], is_encoded), wanted)
            for (place, _), content in zip(wanted, found, strict=True):
                on_read()
                if content is not None:
                    self._known[place] = content
                    self._where[content.target] = place, False
                    if content.source is not None:
                        self._where.setdefault(content.source, (place, True))
        finally:  # a stop does not wait for the rest
            pool.shutdown(cancel_futures=True)

    def of(self, place: Place) -> Content | None:
        return self._known.get(place)

    def views(self, *, targets: bool = True, sources: bool = True) -> list[View]:
        """Every picture as any batch may show it, mirrored ones too."""
        found: dict[View, None] = {}
        for content in self._known.values():
            for mirrored in self._ways(content):
                target, source = content.views(mirrored)
                found |= dict.fromkeys([target] if targets else [])
                found |= dict.fromkeys([source] if sources and source is not None else [])
        return list(found)

    def prompts(self) -> list[str]:
        """What the model is told of them, each once."""
        return list(dict.fromkeys(content.prompt for content in self._known.values()))

    def load(self, view: View) -> ImageRows:
        """One picture decoded, one row. Raises DataError when it is gone, or another by now."""
        (number, row), is_source = self._where[view.digest]
        one = self._sets[number]
        path, key = one.where(row)
        try:
            sample = one.read(row)
        except BadSample as bad:
            raise DataError([bad.fault.problem()]) from bad
        data = sample.source if is_source else sample.image
        if data is None or hashlib.sha256(data).hexdigest() != view.digest:
            reason = f"{key}: changed since the start of the run" if key else "changed since the start of the run"
            raise DataError([Problem(path, reason, "Put the old one back and resume, or start a new run")])
        image = fitted(decode_image(Path(one.name), data), *view.size, mirrored=view.flipped)
        sizes, crops = torch.tensor([image.original_size]), torch.tensor([image.crop])
        return ImageRows(to_unit_range(image.pixels)[None], sizes, crops)

    def _ways(self, content: Content) -> tuple[bool, ...]:
        return (False, True) if self._flip and may_flip(content.prompt) else (False,)

    def _shown(self, content: Content) -> list[View]:
        return [view for mirrored in self._ways(content) for view in content.views(mirrored) if view is not None]

    def _read(self, place: Place, size: Size, is_encoded: IsEncoded) -> Content | None:
        one, row = self._sets[place[0]], place[1]
        try:
            sample = one.read(row)
            source = None if sample.source is None else hashlib.sha256(sample.source).hexdigest()
            prompt = self._decoder.prompt(one, row, sample)
            content = Content(prompt, hashlib.sha256(sample.image).hexdigest(), source, size)
            if all(map(is_encoded, self._shown(content))):
                self._decoder.check_shape(one, row, sample)
            else:
                self._decoder.decoded(one, row)
        except BadSample:
            return None
        return content
