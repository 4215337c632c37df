"""A table that names pictures and has their captions: JSON lines, a JSON list or object, or CSV, as `metadata.jsonl` of
a Hugging Face imagefolder. Paths start at the table's folder, or at `root`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from glm_training.data.captioned.layouts.tables.columns import Columns, ColumnsMissing, columns_of
from glm_training.data.captioned.layouts.tables.text_tables import TableRow, table_head, table_rows
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import (
    BadSample,
    CaptionFault,
    Encoded,
    Fault,
    StringTable,
    as_spelled,
    bounds,
    checked_caption,
    file_size,
    read_below,
)
from glm_training.data.captioned.sniff import IMAGE_SUFFIXES, files_below
from glm_training.data.paths import PathRefused, local_path
from glm_training.data.problems import DataError, Problem
from glm_training.utils.words import counted

NAME = 'a table of pictures and captions, as metadata.jsonl with {"file_name": "a.jpg", "text": "..."} on each line'
_REMEDY = "Correct the record"


def open_set(options: SetOptions, reading: Reading, tables: Sequence[Path]) -> RecordSet:
    """The samples of `tables`, files of this layout. Raises DataError with all that no quarantine cures."""
    found = RecordSet(options, reading, tables)
    if len(found) == 0:
        told = Problem(options.path, f"none of {counted(len(found.faults), 'record')} can be used", f"Write {NAME}")
        raise DataError([told, *(fault.problem() for fault in found.faults[:3])])
    return found


class RecordSet:
    """See :class:`ImageSet`. In memory a sample is its paths and its caption, as the table has them, and 16 bytes."""

    layout = NAME

    def __init__(self, options: SetOptions, reading: Reading, tables: Sequence[Path]) -> None:
        self.name = str(options.path)
        self.faults: list[Fault] = []
        self.remarks: list[str] = []
        self._tables = list(tables)
        self._roots = [table.parent if options.root is None else options.root for table in tables]
        self._real_roots = [bounds(root) for root in self._roots]
        self._digests: dict[str, str] = {}
        self._units: dict[int, str] = {}
        self._captions, self._sources, self._optional = reading.captions, reading.sources, reading.optional
        rows: list[tuple[int, int, tuple[str, str, str]]] = []
        problems: list[Problem] = []
        for number, table in enumerate(tables):
            try:
                rows += [(number, line, texts) for line, texts in self._usable(number, table, options, reading)]
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)
        self._origins = np.array([origin for origin, _, _ in rows], dtype=np.uint32)
        self._lines = np.array([line for _, line, _ in rows], dtype=np.uint32)
        self._images, self._texts, self._edited = (
            StringTable(texts[part] for _, _, texts in rows) for part in range(3)
        )
        if len(tables) > 1:
            named = ", ".join(str(table.relative_to(options.path)) for table in list(tables)[:3])
            self.remarks.append(f"{self.name}: {len(tables)} tables are read ({named}); the path may name one of them")
        if options.path.is_dir() and reading.captions:
            self.remarks += self._unnamed(options.path)

    def _usable(
        self, number: int, table: Path, options: SetOptions, reading: Reading
    ) -> list[tuple[int, tuple[str, str, str]]]:
        """Line, and picture, caption and source, of the records that name files that are there."""
        try:
            head = table_head(table)
            assert head is not None  # it was claimed
            columns = columns_of(head.columns, options.cap_source, captions=reading.captions, sources=reading.sources)
        except ColumnsMissing as missing:
            raise DataError([Problem(table, str(missing), missing.remedy)]) from missing
        self._units[number] = "line" if head.kind in ("json lines", "csv") else "record"
        self._tell_columns(table, columns)
        told = [(row, self._texts_of(row, columns, self._roots[number])) for row in table_rows(table, head)]
        kept: list[tuple[int, tuple[str, str, str]]] = []
        digest = hashlib.sha256(repr(columns).encode())
        root = self._roots[number]
        with ThreadPoolExecutor(max(reading.threads, 1), thread_name_prefix="records") as pool:
            sizes = pool.map(lambda pair: self._sizes(root, pair[1]), told)
            for (row, texts), found in zip(told, sizes, strict=True):
                fault = texts if isinstance(texts, str) else next((one for one in found if isinstance(one, str)), None)
                if fault is None and not isinstance(texts, str):
                    kept.append((row.number, texts))
                    digest.update(f"{texts!r} {found}\n".encode("utf-8", "surrogatepass"))
                else:
                    self.faults.append(Fault(table, f"{self._units[number]} {row.number}", str(fault), _REMEDY))
        self._digests[str(table)] = digest.hexdigest()
        return kept

    def idle_tables(self) -> list[Path]:
        """Tables of which no record can be used."""
        used = set(self._origins.tolist())
        return [table for number, table in enumerate(self._tables) if number not in used]

    def _tell_columns(self, table: Path, columns: Columns) -> None:
        if self._captions and columns.others:
            also = ", ".join(columns.others)
            self.remarks.append(f"{table}: captions are of the column {columns.caption}; cap_source may name {also}")
        if columns.source is not None and not self._sources:
            self.remarks.append(f"{table}: the pictures of the column {columns.source} are for training.mode i2i")

    def _texts_of(self, row: TableRow, columns: Columns, root: Path) -> tuple[str, str, str] | str:
        """Picture, caption and source of a record, or why it has none."""
        if row.values is None:
            return row.fault
        wanted = [columns.image, columns.source if self._sources else None]
        paths = []
        for key in wanted:
            path = "" if key is None else row.values.get(key)
            if not isinstance(path, str) or (key is not None and not path.strip()):
                return f"{key!r} is no path" if key in row.values else f"has no {key!r}"
            try:
                local_path(path)
            except PathRefused as refusal:
                return refusal.reason
            paths.append(as_spelled(root, path.strip()))
        if not self._captions or columns.caption is None:
            return paths[0], "", paths[1]
        text = row.values.get(columns.caption)
        if isinstance(text, list) and text:  # several captions of one picture: the first
            text = text[0]
        if not isinstance(text, str):
            return f"{columns.caption!r} is no text" if columns.caption in row.values else f"has no {columns.caption!r}"
        try:
            return paths[0], checked_caption(text, row.number, optional=self._optional), paths[1]
        except CaptionFault as fault:
            return fault.reason

    @staticmethod
    def _sizes(root: Path, texts: tuple[str, str, str] | str) -> list[int | str]:
        if isinstance(texts, str):
            return []
        return [file_size(root, path) for path in (texts[0], texts[2]) if path]

    def _unnamed(self, folder: Path) -> Iterable[str]:
        """How many pictures of the folder no record names."""
        named = {os.path.normpath(self._roots[self._origins[row]] / self._images[row]) for row in range(len(self))}
        named |= {os.path.normpath(self._roots[self._origins[row]] / self._edited[row]) for row in range(len(self))}
        pictures = (path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
        others = [path.name for path in pictures if os.path.normpath(path) not in named]
        count = len(others) - len(self.faults)  # those of records at fault are named
        if count > 0:
            yield f"{self.name}: {counted(count, 'picture')} that no record names ({', '.join(others[:3])})"

    def __len__(self) -> int:
        return len(self._images)

    def read(self, row: int) -> Encoded:
        origin = int(self._origins[row])
        root, real_root = self._roots[origin], self._real_roots[origin]
        try:
            image = read_below(real_root, root / self._images[row])
            source = read_below(real_root, root / self._edited[row]) if self._sources else None
        except BadSample as bad:
            path, place = self.where(row)
            raise BadSample(Fault(path, place, f"{bad.fault.path} {bad.fault.reason}", bad.fault.remedy)) from bad
        return Encoded(image, self._texts[row] if self._captions else None, source)

    def part(self, row: int, offset: int, size: int) -> bytes:
        return self.read(row).image[offset : offset + size]

    def where(self, row: int) -> tuple[Path, str]:
        origin = int(self._origins[row])
        return self._tables[origin], f"{self._units[origin]} {self._lines[row]} ({self._images[row]})"

    def digests(self) -> dict[str, str]:
        return dict(self._digests)

    def close(self) -> None:
        """Nothing stays open."""
