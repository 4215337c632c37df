"""The size that each picture of some sets has in a batch, by its bucket: from the headers of their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from glm_training.data.captioned.samples import BadSample, Fault, ImageSet
from glm_training.data.pictures.buckets import Buckets, Size
from glm_training.data.pictures.picture_size import in_memory, upright_size
from glm_training.data.problems import DataError

_AT_ONCE = 8192
"""Pictures that are handed to the threads together."""
_NONE = -1


class PictureSizes:
    """Sizes by set and row, each read when it is first asked for; 8 bytes per picture.

    ``unsuitable`` says of an upright (height, width) why it is left out, and what to do to use it; None where it is
    not. ``sources``: samples have sources, which are not enlarged for their targets either; they are read whole.
    """

    def __init__(
        self,
        sets: Sequence[ImageSet],
        buckets: Buckets,
        unsuitable: Callable[[Size], tuple[str, str] | None],
        *,
        sources: bool = False,
    ) -> None:
        self._sets = tuple(sets)
        self._sources = sources
        self._unsuitable = unsuitable
        self._buckets = buckets
        self._known = [np.zeros((len(one), 2), dtype=np.int32) for one in sets]
        self._alike: dict[tuple[int, Size], np.ndarray] = {}

    def of(self, number: int, row: int) -> Size:
        """Height and width that a picture has in a batch; raises BadSample where it cannot be used, DataError where the
        data changed since the start."""
        height, width = self._known[number][row].tolist()
        if height > 0:
            return height, width
        size = self._read(number, row)
        self._known[number][row] = size
        return size

    def measure(self, number: int, threads: int) -> tuple[np.ndarray, list[BadSample]]:
        """Reads the headers of a whole set; gives the rows that can be used, and what is wrong with the others."""
        known, bad = self._known[number], list[BadSample]()
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="sizes") as pool:
            for start in range(0, len(known), _AT_ONCE):
                rows = range(start, min(start + _AT_ONCE, len(known)))
                for row, found in zip(rows, pool.map(partial(self._tried, number), rows), strict=True):
                    if isinstance(found, BadSample):
                        known[row] = _NONE
                        bad.append(found)
        return np.flatnonzero(known[:, 0] > 0), bad

    def alike(self, number: int, row: int) -> np.ndarray:
        """Rows of a measured set that have the size of a row."""
        size = self.of(number, row)
        if (number, size) not in self._alike:
            self._alike[number, size] = np.flatnonzero((self._known[number] == size).all(axis=1)).astype(np.int32)
        return self._alike[number, size]

    def _tried(self, number: int, row: int) -> Size | BadSample:
        try:
            return self.of(number, row)
        except BadSample as bad:
            return bad

    def _read(self, number: int, row: int) -> Size:
        one = self._sets[number]
        sources: list[Size] = []
        try:
            shape = upright_size(Path(one.name), partial(one.part, row), lambda: one.read(row).image)
            data = one.read(row).source if self._sources else None
            if data is not None:
                sources.append(upright_size(Path(one.name), in_memory(data), lambda: data))
        except DataError as error:
            problem = error.problems[0]
            if problem.path != Path(one.name):  # it is not the picture that is at fault
                raise
            raise BadSample(Fault(*one.where(row), problem.reason, problem.remedy)) from error
        size, fault = self._buckets.size(shape, *sources), self._unsuitable(shape)
        if size is None or fault is not None:
            reason, remedy = fault or self._buckets.why_none(min(shape, *sources, key=min))
            raise BadSample(Fault(*one.where(row), reason, remedy, unsuitable=True))
        return size
