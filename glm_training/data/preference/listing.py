"""Listings of preference pairs as text: JSON lines, or one JSON list. Read without opening an image.

A record has one of two shapes: ``prompt, preferred, rejected`` with two paths, or that of pickapic_v2, ``caption,
jpg_0, jpg_1, label_0``, where label_0 is 1 when the first image is preferred, 0 when the second is, 0.5 for a tie.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm_training.data.json_records import read_json_lines, read_json_list
from glm_training.data.paths import PathRefused, path_below
from glm_training.data.preference.dataset import FileImage, PairImage, PreferencePair
from glm_training.data.problems import Problem
from glm_training.data.text_lines import TextFile, prompt_fault

_PLAIN = ("prompt", "preferred", "rejected")
_JUDGED = ("caption", "jpg_0", "jpg_1", "label_0")
EXAMPLE = 'Write {"prompt": "...", "preferred": "images/0_a.png", "rejected": "images/0_b.png"}'
LABELS = (0, 0.5, 1)


@dataclass
class PairListing:
    """What a listing holds: usable pairs, the number of ties dropped and of rows, and every fault found so far."""

    path: Path
    pairs: list[PreferencePair] = field(default_factory=list)
    ties: int = 0
    total: int = 0
    problems: list[Problem] = field(default_factory=list)
    lines: dict[int, int] = field(default_factory=dict)
    """Index of a row -> its line in ``path``, where it has lines."""

    def add(self, index: int, reason: str, remedy: str) -> None:
        """A fault of one row."""
        self.problems.append(Problem(self.path, reason, remedy, line=self.lines.get(index), index=index))


def read_listing(file: TextFile) -> PairListing:
    """The pairs of a file: JSON lines or one JSON list, as its content says; images relative to its folder.

    What begins as neither, under a name that promises neither, is a problem of the file as a whole.
    """
    if not file.lines:
        empty = Problem(file.path, "holds no pair", EXAMPLE)
        return PairListing(file.path, problems=file.problems or [empty])
    listing = PairListing(file.path)
    start = next((line.text for line in file.lines if line.text), "")
    if start.startswith("["):
        records, listing.problems = read_json_list(file)
    elif start.startswith("{") or file.path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        records, listing.problems = read_json_lines(file.lines, EXAMPLE), list(file.problems)
    else:
        reason = "is no listing of preference pairs: it does not begin as JSON"
        return PairListing(file.path, problems=[Problem(file.path, reason, f"{EXAMPLE} on each line")])
    listing.total = len(records)
    for record in records:
        listing.lines[record.line.index] = record.line.number
        if record.fault is not None:
            listing.add(record.line.index, *record.fault)
        elif record.line.text is not None:
            _read_record(listing, record.line.index, record.value)
    if not records and not listing.problems:
        listing.problems.append(Problem(file.path, "holds no pair", EXAMPLE))
    return listing


def _read_record(listing: PairListing, index: int, record: object) -> None:
    if not isinstance(record, dict):
        listing.add(index, f"not a JSON object but {type(record).__name__}", EXAMPLE)
        return
    before = len(listing.problems)
    judged = any(key in record for key in _JUDGED)
    allowed = _JUDGED if judged else _PLAIN
    for key in record:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            remedy = f"Did you mean {near[0]!r}? Allowed" if near else "Remove it; allowed"
            listing.add(index, f"unknown key {key!r}", f"{remedy}: {', '.join(allowed)}")
    prompt = read_prompt(listing, index, record, allowed[0])
    images = [_read_image(listing, index, record, key) for key in allowed[1:3]]
    order = read_label(listing, index, record.get("label_0")) if judged else (0, 1)
    if len(listing.problems) > before or prompt is None:
        return
    add_pair(listing, index, prompt, images, order)


def add_pair(
    listing: PairListing, index: int, prompt: str, images: list[PairImage | None], order: tuple[int, int] | None
) -> None:
    """Put the pair into the listing, preferred image first; with no ``order`` it is a tie, which is counted."""
    if order is None:
        listing.ties += 1
        return
    preferred, rejected = images[order[0]], images[order[1]]
    if preferred is None or rejected is None:
        raise AssertionError(f"row {index} has no image and no problem that says so")
    if preferred == rejected:
        listing.add(index, "both images of the pair are the same file", "Name two images")
        return
    listing.pairs.append(PreferencePair(index, prompt, preferred, rejected))


def read_prompt(listing: PairListing, index: int, record: Mapping[str, object], key: str) -> str | None:
    """The prompt under ``key``, stripped, or None with its fault reported."""
    fault = prompt_fault(record, key, index)
    if fault is not None:
        listing.add(index, *fault)
        return None
    return str(record[key]).strip()


def read_label(listing: PairListing, index: int, label: object) -> tuple[int, int] | None:
    """(preferred, rejected) image numbers; None for a tie, and for a label at fault, which is reported."""
    if isinstance(label, bool) or not isinstance(label, int | float) or label not in LABELS:
        remedy = "Write 1 when the first image is preferred, 0 when the second is, 0.5 for a tie"
        listing.add(index, f"label_0 is {label!r}, not one of 0, 0.5, 1", remedy)
        return None
    return None if label == 0.5 else (0, 1) if label == 1 else (1, 0)


def _read_image(listing: PairListing, index: int, record: dict[str, object], key: str) -> PairImage | None:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        reason = f"key {key!r} is not a path" if key in record else f"index {index} has no {key} image"
        listing.add(index, reason, f'Add "{key}": "path/to/image.png"')
        return None
    try:
        return FileImage(path_below(listing.path.parent, value))
    except PathRefused as refusal:
        listing.add(index, f"{key} image: {refusal.reason}", refusal.remedy)
        return None
