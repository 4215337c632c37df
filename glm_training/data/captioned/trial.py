"""What is found out about sets of captioned pictures before training: sizes, and whether their samples can be used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from glm_training.data.captioned.decoding import SampleDecoder
from glm_training.data.captioned.samples import BadSample, Fault, ImageSet
from glm_training.data.captioned.sizes import PictureSizes
from glm_training.data.problems import DataError
from glm_training.data.prompt_lengths import PromptReader, check_lengths
from glm_training.utils.words import counted

ALIKE_SHOWN = 5
"""Faults that are shown of a set that has nothing else."""


@dataclass
class Found:
    """What cannot be used, what is left out for its shape, and what of captions the model does not read, in words."""

    broken: list[Fault] = field(default_factory=list)
    unsuitable: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, bad: Sequence[BadSample]) -> None:
        self.broken += [one.fault for one in bad if not one.unsuitable]
        self.unsuitable += [one.fault for one in bad if one.unsuitable]


def measured(sets: Sequence[ImageSet], sizes: PictureSizes, threads: int) -> tuple[list[np.ndarray], Found]:
    """The rows of each set that have a size, and the others. Raises DataError where a set has none."""
    usable: list[np.ndarray] = []
    found = Found()
    for number, one in enumerate(sets):
        rows, bad = sizes.measure(number, threads)
        found.add(bad)
        if not len(rows):
            _refuse(one, bad, "all")
        usable.append(rows)
    return usable, found


def try_some(
    sets: Sequence[ImageSet], decoder: SampleDecoder, reader: PromptReader | None, most: int, threads: int
) -> Found:
    """Reads up to `most` samples of each set, evenly spread: a key that no caption has, say, is known before training.
    Raises DataError where nothing that is tried of a set can be used."""
    found = Found()
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode") as pool:
        for one in sets:
            count = min(len(one), most)
            rows = [place * len(one) // count for place in range(count)]
            tried = list(pool.map(lambda row, own=one: prompt_or_fault(decoder, own, row), rows))
            bad = [fault for fault in tried if isinstance(fault, BadSample)]
            if bad and len(bad) == count:
                _refuse(one, bad, "all" if count == len(one) else f"all of {count} that were tried")
            found.add(bad)
            if reader is not None:
                texts = [(row, None, told) for row, told in zip(rows, tried, strict=True) if isinstance(told, str)]
                found.remarks += check_lengths(Path(one.name), texts, reader)[1]
    return found


def prompt_or_fault(decoder: SampleDecoder, one: ImageSet, row: int) -> str | BadSample:
    """The prompt of a sample that can be used, else why it cannot."""
    try:
        return decoder.decoded(one, row).prompt
    except BadSample as bad:
        return bad


def _refuse(one: ImageSet, bad: Sequence[BadSample], what: str) -> NoReturn:
    faults = [*one.faults, *(found.fault for found in bad)]
    problems = [fault.problem() for fault in faults[:ALIKE_SHOWN]]
    heading = (
        f"{one.name}: {counted(len(one) + len(one.faults), 'sample')}, and {what} cannot be used, the first of them:"
    )
    raise DataError(problems, heading)
