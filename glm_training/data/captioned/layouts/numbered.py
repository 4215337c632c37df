"""The layout of `data.prompts_file` as a set: a text with one prompt per line, beside it `target_images/0.png`, and for
edits `source_images/0.png`, numbered by line from 0.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import CaptionFault, Encoded, Fault, checked_caption, read_below
from glm_training.data.problems import DataError, Problem
from glm_training.data.prompts_layout.layout import layout_of
from glm_training.data.prompts_layout.listing import Listing, Request, read_numbered
from glm_training.data.text_lines import read_text

NAME = "a prompts.txt with one prompt per line, beside it target_images/0.png, 1.png, ..."
TARGETS, SOURCES = "target_images", "source_images"


def claims(text: Path) -> bool:
    """Whether a text is this layout: its pictures lie beside it, and it is no JSON."""
    return (text.parent / TARGETS).is_dir() and layout_of(read_text(text)) == "prompts"


def open_set(options: SetOptions, reading: Reading, text: Path) -> NumberedSet:
    """The prompts of `text` with their pictures. Raises DataError with all that no quarantine cures."""
    folder = text.parent
    if reading.sources and not (folder / SOURCES).is_dir():
        remedy = f"Put the pictures to edit there, or point {SOURCES} at their folder, or train in mode t2i"
        raise DataError([Problem(folder, f"has no folder {SOURCES}", remedy)])
    sources = folder / SOURCES if reading.sources else None
    request = Request("i2i" if reading.sources else "t2i", text, folder / TARGETS, sources, require_targets=True)
    file = read_text(text)
    listing = read_numbered(request, text, file.lines)
    problems = [*file.problems, *listing.problems]
    incurable = [problem for problem in problems if problem.index is None]
    if incurable or not listing.rows:
        raise DataError(incurable or [Problem(text, "holds no prompt", "Write one prompt per line")])
    faults = [Fault(text, f"line {problem.line}", problem.reason, problem.remedy) for problem in problems]
    found = NumberedSet(options, reading, listing, faults, {problem.index for problem in problems})
    if not len(found):
        raise DataError([fault.problem() for fault in faults])
    return found


class NumberedSet:
    """See :class:`ImageSet`."""

    layout = NAME

    def __init__(
        self, options: SetOptions, reading: Reading, listing: Listing, faults: list[Fault], bad: set[int | None]
    ) -> None:
        self.name = str(options.path)
        self.faults = faults
        self.remarks: list[str] = []
        self._reading = reading
        self._text = listing.path
        self._root = os.path.realpath(listing.path.parent)
        self._rows = [row for row in listing.rows if row.index not in bad]
        digest = hashlib.sha256()
        for row in list(self._rows):
            try:
                prompt = checked_caption(row.prompt or "", row.index)
            except CaptionFault as fault:
                self.faults.append(Fault(self._text, f"line {row.line}", fault.reason, fault.remedy))
                self._rows.remove(row)
                continue
            row.prompt = prompt
            sizes = [path.stat().st_size for path in row.images.values()]
            digest.update(f"{row.index} {prompt!r} {sizes}\n".encode())
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Encoded:
        one = self._rows[row]
        # each picture lies below its own folder, links resolved, or it was refused
        image, *source = (read_below(str(path.parent), path) for path in one.images.values())
        return Encoded(image, one.prompt if self._reading.captions else None, source[0] if source else None)

    def part(self, row: int, offset: int, size: int) -> bytes:
        return self.read(row).image[offset : offset + size]

    def where(self, row: int) -> tuple[Path, str]:
        one = self._rows[row]
        return self._text, f"line {one.line} ({one.images['target'].name})"

    def digests(self) -> dict[str, str]:
        return {str(self._text): self._digest}

    def close(self) -> None:
        """Nothing stays open."""
