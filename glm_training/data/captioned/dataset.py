"""Captioned pictures as batches: read by row, decoded ahead in threads, cut to one size.

What is drawn is a pure function of integers: the crop and the flip of (seed, epoch, index), and the picture in the
place of one that cannot be used of (seed, epoch, index, attempt).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glm_training.data.captioned.contents import IsEncoded, SampleContents
from glm_training.data.captioned.decoding import Captioning, Decoded, Drawn, SampleDecoder, Shaping
from glm_training.data.captioned.samples import HASHED_CAPTIONS, BadSample, Encoded, Fault, ImageSet
from glm_training.data.captioned.sizes import PictureSizes
from glm_training.data.captioned.skipped import SkippedSamples
from glm_training.data.captioned.trial import Found, measured, prompt_or_fault, try_some
from glm_training.data.dataset import check_one_size
from glm_training.data.examples import Batch
from glm_training.data.fingerprint import combined_digest
from glm_training.data.pictures.buckets import Size
from glm_training.data.pictures.images import CroppedImage, to_unit_range
from glm_training.data.problems import DataError
from glm_training.data.prompt_lengths import PromptReader
from glm_training.utils.randomness import derive_seed
from glm_training.utils.words import counted

Crop = Literal["center", "random"]

ATTEMPTS = 100
"""Pictures that are tried for one place: of a set with every second one unusable, none of 10^30 places stays empty."""

TRIED_FIRST = 256
"""Samples of each set that are read before training."""


class CaptionedImages:
    """Sets of captioned pictures, put one after the other; see :class:`glm_training.data.dataset.TrainingData`.

    Args:
        sets: at least one, each with at least one sample.
        shaping: size, crop and what is left out.
        repeats: of each set, how often it comes in an epoch.
        weights: of each set, its share of what is drawn; then ``sampler_lengths`` says what is drawn from.
        seed: the run seed.
        num_workers: threads that read and decode; 0 does it in the caller's thread.
        pin_memory: page-lock the pictures for faster copies to a GPU; without CUDA it has no effect.
        max_bad_fraction: share of all samples, faults known before included, that may be broken.
        skipped_dir: folder of the file that names them; None writes none.
        rank: of this process.
        try_first: samples of each set, evenly spread, that are read here; all of a smaller one.
        measure: with buckets: read the header of every picture here, and leave out those that have no bucket. Without
            it a size is read when it is asked for.
        reader: says how much of a caption the model reads; a sample whose caption it cannot take is broken. None leaves
            that open.
        apart: sets that are held out; kept for evaluations, and never drawn from here.
        captioning: what is made of captions; None leaves them as they are.
        sources: whether the sets were opened with the pictures that their samples were edited from.

    Raises DataError where more samples are known to be broken than may be, or a set has none that can be used.
    """

    def __init__(
        self,
        sets: Sequence[ImageSet],
        shaping: Shaping,
        *,
        repeats: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        max_bad_fraction: float = 0.0,
        skipped_dir: Path | None = None,
        rank: int = 0,
        try_first: int = TRIED_FIRST,
        measure: bool = False,
        reader: PromptReader | None = None,
        apart: Sequence[ImageSet] = (),
        captioning: Captioning | None = None,
        sources: bool = False,
    ) -> None:
        self.sets = tuple(sets)
        self.apart = tuple(apart)
        self.captioning = captioning or Captioning()
        self.sources = sources
        self.shaping = shaping
        self.weights = None if weights is None else tuple(weights)
        counts = [1] * len(self.sets) if repeats is None else list(repeats)
        self._faults = [fault for one in self.sets for fault in one.faults]
        self._unsuitable: list[Fault] = []
        total = sum(map(len, self.sets)) + len(self._faults)
        self.skipped = SkippedSamples(skipped_dir, total, max_bad_fraction, rank)
        self.skipped.note(self._faults)
        self._seed = seed
        self._num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._pending: dict[tuple[int, int], Future[Drawn]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._decoder = SampleDecoder(shaping, self.captioning, reader, seed)
        self.contents = SampleContents(self.sets, self._decoder, flip=shaping.flip)
        self.decodes = True
        buckets = shaping.buckets
        self._sizes = None if buckets is None else PictureSizes(self.sets, buckets, shaping.unsuitable, sources=sources)
        self._usable: Sequence[np.ndarray | None] = [None] * len(self.sets)
        if measure and self._sizes is not None:
            self._usable, found = measured(self.sets, self._sizes, num_workers)
            self._take_note(found)
            self._unsuitable = found.unsuitable
        lengths = [len(one if rows is None else rows) for one, rows in zip(self.sets, self._usable, strict=True)]
        self.set_lengths = tuple(length * count for length, count in zip(lengths, counts, strict=True))
        self._ends = np.cumsum(self.set_lengths).tolist()
        if self.skipped.too_many():  # then what else is broken is told with it
            try_first = max(try_first, TRIED_FIRST)
        found = try_some(self.sets, self._decoder, reader, try_first, num_workers)
        self._take_note(found)
        self.skipped.check()
        self.remarks = [remark for one in self.sets for remark in one.remarks] + list(self._told()) + found.remarks

    def __len__(self) -> int:
        return int(self._ends[-1])

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of the picture at `index` in a batch; with buckets those of its own shape.

        Raises BadSample for a picture that has no bucket, unless all were measured.
        """
        number, row = self._row(index)
        return (self.shaping.height, self.shaping.width) if self._sizes is None else self._sizes.of(number, row)

    def where(self, index: int) -> tuple[Path, str]:
        """The file that the sample at an index is in, and its name there."""
        number, row = self._row(index)
        return self.sets[number].where(row)

    def batch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> Batch:
        """The samples at `indices`, each in [0, len(self)); a broken or unsuitable one gives way to another of its set.

        Args:
            indices: at least one.
            epoch: decides crops, flips and replacements; one for all, or one for each.

        Raises:
            DataError: where more samples are broken than may be, or none can be found for a place.
            IndexError, ValueError: for positions or epochs out of place, and for pictures of several sizes.
        """
        self.skipped.begin(self._faults, self._unsuitable)
        places = self._places(indices, epoch)
        check_one_size([self.size_of(index) for index in indices])
        loaded = self._load(places)
        shown = [one.target_view for one in loaded if one.target_view is not None]
        edited = [one.source_view for one in loaded if one.source_view is not None]
        batch = Batch(
            indices=list(indices),
            prompts=[one.prompt for one in loaded],
            targets=None,
            sources=None,
            target_views=shown if len(shown) == len(loaded) else None,
            source_views=edited if len(edited) == len(loaded) else None,
        )
        targets = [one.target for one in loaded if one.target is not None]
        if not targets:
            return batch
        return replace(
            batch,
            targets=self._stacked(targets),
            sources=self._stacked([one.source for one in loaded if one.source is not None]) if self.sources else None,
            original_sizes=torch.tensor([target.original_size for target in targets]),
            crops=torch.tensor([target.crop for target in targets]),
        )

    def _stacked(self, images: Sequence[CroppedImage]) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1]."""
        batch = to_unit_range(torch.stack([image.pixels for image in images]))
        return batch.pin_memory() if self._pin_memory else batch

    def prefetch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> None:
        """Start reading what a coming :meth:`batch` with the same arguments needs; earlier unused ones are let go."""
        if self._num_workers < 1:
            return
        wanted = self._places(indices, epoch)
        for place in self._pending.keys() - set(wanted):
            self._pending.pop(place).cancel()
        for place in wanted:
            self._start(place)

    def read(self, index: int) -> Encoded:
        """The sample at `index` as it is, but for the trigger word; raises BadSample."""
        number, row = self._row(index)
        sample = self.sets[number].read(row)
        return sample if sample.caption is None else replace(sample, caption=self.captioning.prompt(sample.caption))

    def prompts(self, most: int = HASHED_CAPTIONS) -> list[tuple[str, str]]:
        """Place and prompt of each sample that can be read; of more than `most` so many, evenly spread."""
        count = min(len(self), most)
        rows = [place * len(self) // count for place in range(count)]
        with ThreadPoolExecutor(max(self._num_workers, 1), thread_name_prefix="captions") as pool:
            found = list(pool.map(self._told_at, rows))
        return [one for one in found if one is not None]

    def _told_at(self, index: int) -> tuple[str, str] | None:
        try:
            prompt = self.read(index).caption or ""
        except BadSample:
            return None
        path, key = self.where(index)
        return key or path.name, prompt

    def look(self, index: int) -> Decoded:
        """The sample at `index`, its pictures in their own sizes; raises BadSample."""
        number, row = self._row(index)
        return self._decoder.decoded(self.sets[number], row)

    def survey(
        self,
        is_encoded: IsEncoded,
        indices: Sequence[int] | None = None,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        """Reads every sample once, or those at `indices`: from here on batches know the content of their pictures.
        What `is_encoded` knows is not decoded. `on_read` is called after each, and may raise."""
        samples = {
            self._row(index): self.size_of(index) for index in (range(len(self)) if indices is None else indices)
        }
        self.contents.read(samples.items(), is_encoded, self._num_workers, on_read)

    def example_digests(self) -> dict[str, str]:
        """Tar, listing or folder -> SHA-256, for :func:`describe_drift`; see :meth:`ImageSet.digests`."""
        found: dict[str, str] = {}
        for name, digest in (told for one in self.sets for told in one.digests().items()):
            first = found.get(name, digest)  # a place may be read in two ways, as two splits
            found[name] = digest if digest == first else combined_digest({first: digest})
        return found

    def close(self) -> None:
        """Stop the threads and let go of open files; a later batch starts anew."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._pending.clear()
        for one in self.sets:
            one.close()

    # -- before training -----------------------------------------------------------------------------------------------

    def _take_note(self, found: Found) -> None:
        self._faults += found.broken
        self.skipped.note(found.broken)
        self.skipped.note(found.unsuitable, unsuitable=True)

    def tried(self, index: int) -> BadSample | None:
        """Why the sample at `index` cannot be used; None where it can."""
        number, row = self._row(index)
        tried = prompt_or_fault(self._decoder, self.sets[number], row)
        return tried if isinstance(tried, BadSample) else None

    def _told(self) -> Iterator[str]:
        broken, unsuitable = self.skipped.counts()
        if broken:
            yield f"{counted(broken, 'sample')} left out as broken, each named in skipped_samples.jsonl"
        if unsuitable:
            shaping = self.shaping
            which = "of the pictures that were tried" if self._sizes is None else "of the pictures"
            least = "" if shaping.buckets is None else f", no bucket ({shaping.buckets.smallest} px and more)"
            yield (
                f"{which} {unsuitable} left out: a side of at most {shaping.min_side} px "
                f"(data.min_side){least}, or sides of more than {shaping.max_aspect:g} to 1 (data.max_aspect)"
            )

    # -- reading -------------------------------------------------------------------------------------------------------

    def _row(self, index: int) -> tuple[int, int]:
        """The set of an index, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} is outside a dataset of {len(self)} samples")
        number = bisect_right(self._ends, index)
        place = index - self._ends[number] + self.set_lengths[number]
        rows = self._usable[number]
        return number, place % len(self.sets[number]) if rows is None else int(rows[place % len(rows)])

    def _places(self, indices: Sequence[int], epoch: int | Sequence[int]) -> list[tuple[int, int]]:
        if not indices:
            raise ValueError("a batch needs at least one position")
        epochs = [epoch] * len(indices) if isinstance(epoch, int) else list(epoch)
        if len(epochs) != len(indices):
            raise ValueError(f"{len(epochs)} epochs were given for {len(indices)} positions")
        for index in indices:
            self._row(index)
        return list(zip(indices, epochs, strict=True))

    def _start(self, place: tuple[int, int]) -> None:
        if place in self._pending:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        self._pending[place] = self._pool.submit(self._sample, *place)

    def _load(self, places: list[tuple[int, int]]) -> list[Drawn]:
        if self._num_workers < 1:
            found = [self._sample(*place) for place in places]
        else:
            for place in places:
                self._start(place)
            futures = {place: self._pending.pop(place) for place in dict.fromkeys(places)}
            done = {place: future.result() for place, future in futures.items()}
            found = [done[place] for place in places]
        if any(one.target is not None for one in found):  # one that was not surveyed: then all have their pixels
            lacking = [row for row, one in enumerate(found) if one.target is None]
            for row in lacking:
                found[row] = self._sample(*places[row], decodes=True)
        return found

    def _sample(self, index: int, epoch: int, *, decodes: bool = False) -> Drawn:
        """The sample at `index`, or the one that stands in for it."""
        number, row = self._row(index)
        size, others = self.size_of(index), self._others(number, row)
        faults: list[Fault] = []
        for attempt in range(ATTEMPTS):
            if attempt:
                drawn = derive_seed(self._seed, "captioned replacement", epoch, index, attempt)
                row = int(others[drawn % len(others)])
            known = self._shown((number, row), size, index, epoch)
            if known is not None and not (decodes or self.decodes):
                return known
            try:
                decoded = self._decoder.decoded(self.sets[number], row)
            except BadSample as bad:
                self.skipped.add(bad.fault, unsuitable=bad.unsuitable)
                faults.append(bad.fault)
                continue
            found = self._decoder.drawn(decoded, size, index, epoch)
            if known is None:
                return found
            return replace(found, target_view=known.target_view, source_view=known.source_view)
        heading = f"{self.sets[number].name}: {ATTEMPTS} samples drawn one after the other cannot be used:"
        raise DataError([fault.problem() for fault in dict.fromkeys(faults)], heading)

    def _shown(self, place: tuple[int, int], size: Size, index: int, epoch: int) -> Drawn | None:
        """A sample without its pixels; None where it was not surveyed, or not at this size."""
        content = self.contents.of(place)
        if content is None or content.size != size or self.shaping.crop == "random":
            return None
        target, source = content.views(self._decoder.is_mirrored(content.prompt, index, epoch))
        return Drawn(self._decoder.shown_prompt(content.prompt, index, epoch), None, None, target, source)

    def _others(self, number: int, row: int) -> Sequence[int] | np.ndarray:
        """Rows of a set that may stand in for one of them: of measured pictures those of its size, if there are any."""
        rows = self._usable[number]
        if self._sizes is None or rows is None:
            return range(len(self.sets[number]))
        alike = self._sizes.alike(number, row)
        return alike if len(alike) > 1 else rows
