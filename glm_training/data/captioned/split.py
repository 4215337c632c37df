"""Pictures that are held out of the training data to judge it by: chosen by what is in them, so that the choice stays
when pictures are added, renamed, moved or put in another order, and copies of a picture are all on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.data.captioned.samples import BadSample, Encoded, ImageSet
from glm_training.data.captioned.trial import ALIKE_SHOWN
from glm_training.data.problems import DataError, Problem
from glm_training.utils.words import counted

LEAST = 4
"""Pictures that are held out at least, where there are eight times as many: of one alone a mean has no error."""


class SomeRows:
    """Some `rows` of a set, in their order, as a set; see :class:`ImageSet`. `known_faults`: whether they are told
    here."""

    def __init__(self, whole: ImageSet, rows: Sequence[int], *, known_faults: bool) -> None:
        self.name, self.layout = whole.name, whole.layout
        self.faults = list(whole.faults) if known_faults else []
        self.remarks = list(whole.remarks) if known_faults else []
        self._whole = whole
        self._rows = np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Encoded:
        return self._whole.read(int(self._rows[row]))

    def part(self, row: int, offset: int, size: int) -> bytes:
        return self._whole.part(int(self._rows[row]), offset, size)

    def where(self, row: int) -> tuple[Path, str]:
        return self._whole.where(int(self._rows[row]))

    def digests(self) -> dict[str, str]:
        return self._whole.digests()

    def close(self) -> None:
        self._whole.close()


def hold_out(pictures: CaptionedImages, fraction: float, *, threads: int = 0) -> tuple[list[ImageSet], list[ImageSet]]:
    """The sets of `pictures` without what is held out, and what is held out of them; reads every picture once.

    A picture is held out where its digest (SHA-256 of its file's bytes), as a fraction of the largest one, is below
    `fraction`, in (0, 1); the smallest ones always are: one of up to 15 pictures, four of 32 and more. What cannot be
    used stays in the training data, which tells of it, and of each set something is left that can be used.

    Raises DataError where no set has two different pictures that can be used.
    """
    digests = _digests(pictures, threads)
    taken = _taken(pictures, digests, fraction * 2**64)
    if not taken:
        raise _none_to_spare(pictures)
    kept: list[ImageSet] = []
    apart: list[ImageSet] = []
    for one, of_set in zip(pictures.sets, digests, strict=True):
        held = [row for row, digest in enumerate(of_set) if digest in taken]
        if not held:
            kept.append(one)
            continue
        kept.append(SomeRows(one, [row for row, digest in enumerate(of_set) if digest not in taken], known_faults=True))
        apart.append(SomeRows(one, held, known_faults=False))
    return kept, apart


def _none_to_spare(pictures: CaptionedImages) -> DataError:
    bad = [found for index in range(len(pictures)) if (found := pictures.tried(index)) is not None]
    if len(bad) == len(pictures):
        heading = f"{pictures.sets[0].name}: none of {counted(len(bad), 'picture')} can be used, the first of them:"
        return DataError([found.fault.problem() for found in bad[:ALIKE_SHOWN]], heading)
    remedy = "Set data.validation to 0 to train on all, or give evaluation.eval_images"
    some = f": {len(bad)} of its {len(pictures)} cannot be used" if bad else ""
    return DataError([Problem(Path(pictures.sets[0].name), f"has no picture to spare to be held out{some}", remedy)])


def _taken(pictures: CaptionedImages, digests: list[list[bytes | None]], limit: float) -> set[bytes]:
    """The digests that are held out: those below `limit`, and the smallest ones."""
    places: dict[bytes, list[int]] = {}
    for index, digest in enumerate(chain.from_iterable(digests)):
        if digest is not None:
            places.setdefault(digest, []).append(index)
    least = max(1, min(LEAST, len(places) // 8))
    sets = [dict.fromkeys(digest for digest in of_set if digest is not None) for of_set in digests]
    taken: set[bytes] = set()

    @cache
    def usable(digest: bytes) -> bool:
        return all(pictures.tried(index) is None for index in places[digest])

    def empties(of_set: dict[bytes, None], digest: bytes) -> bool:
        """Whether nothing that can be used would be left of a set."""
        return not any(usable(other) for other in of_set if other != digest and other not in taken)

    for digest in sorted(places):
        if len(taken) >= least and int.from_bytes(digest[:8], "big") >= limit:
            break
        if usable(digest) and not any(empties(of_set, digest) for of_set in sets if digest in of_set):
            taken.add(digest)
    return taken


def _digests(pictures: CaptionedImages, threads: int) -> list[list[bytes | None]]:
    """Of each set, the digest of each picture; None where it cannot be used."""

    def digest(index: int) -> bytes | None:
        try:
            return hashlib.sha256(pictures.read(index).image).digest()
        except BadSample:
            return None

    found: list[list[bytes | None]] = []
    start = 0
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="digest") as pool:
        for one in pictures.sets:
            found.append(list(pool.map(digest, range(start, start + len(one)))))
            start += len(one)
    return found
