"""The metadata layout: JSON objects, one per line or in one list, each naming the prompt and its images."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from glm_training.data.json_records import Record
from glm_training.data.paths import PathRefused, path_below
from glm_training.data.problems import Problem
from glm_training.data.prompts_layout.listing import Listing, Request, Role, Row, folder_problem
from glm_training.data.text_lines import TextLine, prompt_fault

METADATA_NAME = "metadata.jsonl"
_KEYS = ("prompt", "target", "file_name", "source")
"""``file_name`` is ``target`` under the name that Hugging Face's imagefolder gives it."""

EXAMPLE = 'Write {"prompt": "...", "target": "images/0.png"}'


def read_metadata(request: Request, path: Path, entries: Sequence[Record]) -> Listing:
    """The listing of the records of ``path``; images are relative to its folder, or to their own folder when given."""
    listing = Listing(path)
    roots: dict[Role, Path] = {}
    folders: tuple[tuple[Role, str | Path | None], ...] = (
        ("target", request.target_images_dir),
        ("source", request.source_images_dir),
    )
    for role, folder in folders:
        problem = folder_problem(folder, f"{role}_images_dir") if folder is not None else None
        if problem is not None:
            listing.problems.append(problem)
        else:
            roots[role] = path.parent if folder is None else Path(folder)
    records = [_read_record(listing, entry) for entry in entries]
    wants_target = request.require_targets or request.target_images_dir is not None or any(map(_names_target, records))
    for line, record in zip((entry.line for entry in entries), records, strict=True):
        row = Row(line.index, line.number)
        listing.rows.append(row)
        if record is None:
            continue
        row.prompt = _read_prompt(listing, line, record)
        _check_keys(listing, line, record, request)
        target_key = "target" if "target" in record else "file_name"
        if wants_target:
            _read_image(listing, line, record, target_key, "target", roots, row)
        if request.needs_source:
            _read_image(listing, line, record, "source", "source", roots, row)
    return listing


def _names_target(record: dict[str, object] | None) -> bool:
    return record is not None and ("target" in record or "file_name" in record)


def _read_record(listing: Listing, entry: Record) -> dict[str, object] | None:
    """The object of ``entry``, or None with its fault reported."""
    if entry.line.text is None:
        return None  # its encoding is reported already
    if entry.fault is not None:
        listing.add(entry.line, *entry.fault)
        return None
    if not isinstance(entry.value, dict):
        listing.add(entry.line, f"not a JSON object but {type(entry.value).__name__}", EXAMPLE)
        return None
    return entry.value


def _read_prompt(listing: Listing, line: TextLine, record: dict[str, object]) -> str | None:
    fault = prompt_fault(record, "prompt", line.index)
    if fault is not None:
        listing.add(line, *fault)
        return None
    return str(record["prompt"]).strip()


def _check_keys(listing: Listing, line: TextLine, record: dict[str, object], request: Request) -> None:
    for key in record:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            remedy = f"Did you mean {near[0]!r}? Allowed" if near else "Remove it; allowed"
            listing.add(line, f"unknown key {key!r}", f"{remedy}: {', '.join(_KEYS)}")
    if "target" in record and "file_name" in record:
        listing.add(line, "'target' and 'file_name' both name the target image", "Keep one of them")
    if "source" in record and not request.needs_source:
        remedy = "Train in mode i2i, or remove the key"
        listing.add(line, "'source' is given but mode t2i starts from no image", remedy)


def _read_image(
    listing: Listing,
    line: TextLine,
    record: dict[str, object],
    key: str,
    role: Role,
    roots: dict[Role, Path],
    row: Row,
) -> None:
    """Put the file that ``record[key]`` names into the row, or report why it cannot be used."""
    if key not in record:
        listing.add(line, f"index {line.index} has no {role} image", f'Add "{role}": "path/to/image.png"')
        return
    value = record[key]
    if not isinstance(value, str) or not value:
        listing.add(line, f"key {key!r} is not a path", f'Write "{key}": "path/to/image.png"')
        return
    if role not in roots:
        return  # the folder is at fault and reported
    try:
        row.images[role] = path_below(roots[role], value)
    except PathRefused as refusal:
        listing.add(line, f"{role} image: {refusal.reason}", refusal.remedy)


def metadata_in(folder: Path) -> Path | Problem:
    """The ``metadata.jsonl`` of a folder given in place of a prompts file."""
    path = folder / METADATA_NAME
    if path.is_file():
        return path
    remedy = f"Add {METADATA_NAME}, or name the text file itself, as in {folder / 'prompts.txt'}"
    return Problem(folder, f"is a folder without {METADATA_NAME}", remedy)
