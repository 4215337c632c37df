"""A listing: a JSON list of {"image": FILE, "annotation": FILE}, or a folder of such lists.

The annotation is a JSON object that has the caption under `cap_source`, or a `.txt` that is the caption. Paths start
at the listing's folder, or at `root`; absolute ones must lie below it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import (
    DEFAULT_KEY,
    HASHED_CAPTIONS,
    BadSample,
    CaptionFault,
    Encoded,
    Fault,
    StringTable,
    as_spelled,
    bounds,
    caption_of_json,
    caption_of_text,
    file_size,
    read_below,
    with_captions,
)
from glm_training.data.captioned.sniff import files_below, first_lines, kind_in_folder
from glm_training.data.json_records import Doubled, keeping_pairs
from glm_training.data.paths import PathRefused, local_path
from glm_training.data.problems import DataError, Problem
from glm_training.utils.words import counted

NAME = 'a JSON list of {"image": "a.jpg", "annotation": "a.json"}'
_KEYS = ("image", "annotation")
_REMEDY = f"Write {NAME}"


def open_set(options: SetOptions, reading: Reading) -> ListingSet:
    """The samples of the list, or of the lists of the folder. Raises DataError with all that no quarantine cures."""
    files = [options.path]
    if options.path.is_dir():
        files = [path for path in files_below(options.path) if kind_in_folder(path) == "JSON list"]
    found = ListingSet(options, reading, files)
    if len(found) == 0:
        shown = found.faults[:3]
        what = f"none of {counted(len(found.faults), 'record')} can be used" if shown else "lists no picture"
        raise DataError([Problem(options.path, what, _REMEDY), *(fault.problem() for fault in shown)])
    return found


class ListingSet:
    """See :class:`ImageSet`. In memory a sample is its two paths, as the list has them, and 24 bytes."""

    layout = NAME

    def __init__(self, options: SetOptions, reading: Reading, files: Sequence[Path]) -> None:
        self.name = str(options.path)
        self.faults: list[Fault] = []
        self.remarks: list[str] = []
        self._options = options
        self._captions, self._optional = reading.captions, reading.optional
        self._digests: dict[str, str] = {}
        self._roots: list[Path] = []
        images: list[str] = []
        annotations: list[str] = []
        origins: list[int] = []
        records: list[int] = []
        self._files: list[Path] = []
        others: list[Fault] = []
        for file in files:
            data, values = _read_list(file)
            other = _why_no_listing(values)
            if other is not None:
                others.append(Fault(file, "", other, "Correct it, or take it out"))
                continue
            self._files.append(file)
            self._roots.append(file.parent if options.root is None else options.root)
            for record, image, annotation in self._usable(file, data, values, reading.threads):
                images.append(image)
                annotations.append(annotation)
                origins.append(len(self._files) - 1)
                records.append(record)
        if not self._files:
            raise DataError([Problem(fault.path, fault.reason, _REMEDY) for fault in others])
        self.faults += others
        self._real_roots = [bounds(root) for root in self._roots]
        self._images, self._annotations = StringTable(images), StringTable(annotations)
        self._origins, self._records = np.array(origins, dtype=np.uint32), np.array(records, dtype=np.uint32)

    def _usable(self, file: Path, data: bytes, values: Sequence[object], threads: int) -> list[tuple[int, str, str]]:
        """Number, picture and annotation of the records whose files are there."""
        rows: list[tuple[int, str, str]] = []
        for number, value in enumerate(values):
            fault = _fault(value, self._captions)
            if fault is None and isinstance(value, dict):
                paths = [value[key] for key in (_KEYS if self._captions else _KEYS[:1])]
                image, annotation = [*(as_spelled(self._roots[-1], path) for path in paths), ""][:2]
                rows.append((number, image, annotation))
            elif fault is not None:
                self.faults.append(Fault(file, f"record {number}", fault, _REMEDY))
        root = self._roots[-1]
        digest = hashlib.sha256(data)
        found = []
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="listing") as pool:
            sizes = pool.map(lambda row: [file_size(root, path) for path in row[1:] if path], rows)
            for row, told in zip(rows, sizes, strict=True):
                wrong = next((size for size in told if isinstance(size, str)), None)
                if wrong is None:
                    found.append(row)
                else:
                    self.faults.append(Fault(file, f"record {row[0]}", wrong, "Put it there, or correct the path"))
                digest.update(f"{[size for size in told if isinstance(size, int)]}\n".encode())
        self._digests[str(file)] = digest.hexdigest()
        return found

    def __len__(self) -> int:
        return len(self._images)

    def read(self, row: int) -> Encoded:
        origin = self._origins[row]
        root, real_root = self._roots[origin], self._real_roots[origin]
        image = read_below(real_root, root / self._images[row])
        if not self._captions:
            return Encoded(image, None)
        path = root / self._annotations[row]
        data = read_below(real_root, path)
        try:
            if path.suffix.lower() == ".txt" or (path.suffix.lower() != ".json" and not data.lstrip().startswith(b"{")):
                return Encoded(image, caption_of_text(data, row, optional=self._optional))
            key = self._options.cap_source or DEFAULT_KEY
            return Encoded(image, caption_of_json(data, key, row, optional=self._optional))
        except CaptionFault as fault:
            raise BadSample(Fault(path, "", fault.reason, fault.remedy)) from fault

    def part(self, row: int, offset: int, size: int) -> bytes:
        origin = self._origins[row]
        return read_below(self._real_roots[origin], self._roots[origin] / self._images[row], offset, size)

    def where(self, row: int) -> tuple[Path, str]:
        return self._files[self._origins[row]], f"record {self._records[row]} ({self._images[row]})"

    def digests(self) -> dict[str, str]:
        if not self._captions or len(self) > HASHED_CAPTIONS:
            return dict(self._digests)
        found: dict[str, str] = {}
        for origin, file in enumerate(self._files):
            rows = np.flatnonzero(self._origins == origin)
            notes = [(str(file), self._roots[origin] / self._annotations[int(row)]) for row in rows]
            found |= with_captions({str(file): self._digests[str(file)]}, notes, self._real_roots[origin])
        return found

    def close(self) -> None:
        """Nothing stays open."""


def _read_list(file: Path) -> tuple[bytes, list[object]]:
    try:
        data = file.read_bytes()
        values = json.loads(data, object_pairs_hook=keeping_pairs)
    except OSError as error:
        raise DataError([Problem(file, f"cannot be read: {error.strerror}", "Correct its permissions")]) from error
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}; it begins {first_lines(file)}"
        raise DataError([Problem(file, reason, _REMEDY, line=error.lineno)]) from error
    except (ValueError, RecursionError) as error:
        raise DataError([Problem(file, f"not readable as JSON: {error}", _REMEDY)]) from error
    if not isinstance(values, list):
        raise DataError([Problem(file, f"holds a JSON {type(values).__name__}, not a list", _REMEDY)])
    return data, values


def _why_no_listing(values: Sequence[object]) -> str | None:
    """Why a list names no pictures at all; None where it does, and for an empty one."""
    if not values or any(isinstance(value, dict) and "image" in value for value in values):
        return None
    keys = ", ".join(values[0]) if isinstance(values[0], dict) else type(values[0]).__name__
    return f"its records have no key 'image' (the first one has: {keys})"


def _fault(value: object, captions: bool) -> str | None:
    """Why a record names no sample; None where it does."""
    if not isinstance(value, dict):
        return f"is no object but {type(value).__name__}"
    for key in _KEYS if captions else _KEYS[:1]:
        if isinstance(value, Doubled) and key in value.twice:
            return f"gives {key!r} twice"
        path = value.get(key)
        if not isinstance(path, str) or not path:
            return f"{key!r} is no path" if key in value else f"has no {key!r}"
        try:
            local_path(path)
        except PathRefused as refusal:
            return refusal.reason
    return None
