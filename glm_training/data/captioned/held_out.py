"""The first of captioned pictures, to evaluate on: whole, cut at the centre, the same at every evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.data.captioned.samples import BadSample
from glm_training.data.dataset import ImageDataset
from glm_training.data.examples import Batch, Example, ImageRows, View
from glm_training.data.problems import DataError, Problem


class HeldOutImages(ImageDataset):
    """The first `count` samples of `pictures` as examples with targets, which `batch` reads anew each time.

    ``examples``: prompts by position, empty ones from sets without captions; their files are not named there, since a
    picture may lie in a tar. Digests are of captions and pictures, wherever they lie. A sample that cannot be used is
    passed over, as far as ``pictures`` allows. ``as_sources``: they are what is drawn again, not what is to be
    drawn, and stand in a batch as sources. Raises DataError.
    """

    has_sources = False

    def __init__(
        self, pictures: CaptionedImages, count: int, *, num_workers: int = 0, as_sources: bool = False
    ) -> None:
        self._pictures = pictures
        self._as_sources = as_sources
        self._rows: list[int] = []
        self._digests: dict[str, str] = {}
        examples: list[Example] = []
        with ThreadPoolExecutor(max(num_workers, 1), thread_name_prefix="decode") as pool:
            for start in range(0, len(pictures), count):
                rows = range(start, min(start + count, len(pictures)))
                for row, found in zip(rows, pool.map(self._read, rows), strict=True):
                    if isinstance(found, BadSample):
                        pictures.skipped.note([found.fault], unsuitable=found.unsuitable)
                    elif len(examples) < count:
                        self._digests[str(len(examples))] = found[1]
                        size = pictures.size_of(row)
                        examples.append(Example(len(examples), found[0], None, None, size))
                        self._rows.append(row)
                pictures.skipped.check()
                if len(examples) == count:
                    break
        if not examples:
            problem = Problem(Path(pictures.sets[0].name), "no picture of it can be used", "Look at data.min_side")
            raise DataError([problem])
        shaping = pictures.shaping
        super().__init__(examples, height=shaping.height, width=shaping.width)
        self.remarks = list(pictures.remarks)
        self.has_sources = pictures.sources

    @property
    def has_targets(self) -> bool:
        return not self._as_sources

    def batch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> Batch:
        """Prompts and pictures at `indices`, the same in every epoch."""
        self._select(indices)
        batch = replace(self._pictures.batch([self._rows[index] for index in indices]), indices=list(indices))
        if not self._as_sources:
            return batch
        return replace(batch, targets=None, sources=batch.targets, original_sizes=None, crops=None)

    def prefetch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> None:
        """Start reading what a coming :meth:`batch` needs."""
        self._select(indices)
        self._pictures.prefetch([self._rows[index] for index in indices])

    def views(self, indices: Sequence[int] | None = None, *, targets: bool = True, sources: bool = True) -> list[View]:
        """Every picture as it is shown."""
        self._pictures.survey(lambda view: True, self._rows)  # each was decoded when it was chosen
        return self._pictures.contents.views(targets=targets, sources=sources)

    def load(self, view: View) -> ImageRows:
        """One picture decoded, one row; raises DataError when it is gone, or another by now."""
        return self._pictures.contents.load(view)

    def example_digests(self) -> dict[str, str]:
        """Position (as text) -> SHA-256 of caption and picture."""
        return dict(self._digests)

    def close(self) -> None:
        self._pictures.close()

    def _read(self, row: int) -> tuple[str, str] | BadSample:
        """Caption and digest of a sample that can be used."""
        bad = self._pictures.tried(row)
        if bad is not None:
            return bad
        sample = self._pictures.read(row)
        text = (sample.caption or "").encode("utf-8")
        digest = hashlib.sha256(b"%d:%b%b" % (len(text), text, sample.image))
        digest.update(sample.source or b"")
        return sample.caption or "", digest.hexdigest()
