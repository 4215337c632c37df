"""The two dataset layouts, read without opening an image: which prompt goes with which files.

* numbered: line i of ``prompts.txt`` (from 0) goes with ``target_images/i.png`` and, to edit, ``source_images/i.png``;
* metadata: every record of ``metadata.jsonl`` names its own files (the Hugging Face *imagefolder* convention).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glm_training.data.paths import PathRefused, local_path, resolve_below
from glm_training.data.problems import Problem
from glm_training.data.text_lines import TextLine, text_fault

Mode = Literal["t2i", "i2i"]
Role = Literal["target", "source"]

NUMBERED_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OTHER_IMAGE_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".jxl")
FEW = 3
"""More images than these that belong to no prompt are one fault: they are of another set."""


@dataclass
class Row:
    """One entry of the listing, at ``line`` from 1; ``prompt`` is None when it is at fault, an image when it is absent
    or refused."""

    index: int
    line: int
    prompt: str | None = None
    images: dict[Role, Path] = field(default_factory=dict)


@dataclass
class Listing:
    """The rows of a dataset and every fault found so far. ``path`` is the file whose lines the rows are."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, line: TextLine, reason: str, remedy: str) -> None:
        """A fault of one line."""
        self.problems.append(Problem(self.path, reason, remedy, line=line.number, index=line.index))


@dataclass(frozen=True)
class Request:
    """What to look for; see :func:`glm_training.data.prompts_layout.scan.load_examples` for the fields."""

    mode: Mode
    prompts_file: str | Path
    target_images_dir: str | Path | None
    source_images_dir: str | Path | None
    require_targets: bool

    @property
    def needs_source(self) -> bool:
        return self.mode == "i2i"


def folder_problem(value: str | Path, key: str) -> Problem | None:
    """Why the folder given under ``key`` cannot be used, or None."""
    try:
        path = local_path(value)
    except PathRefused as refusal:
        return Problem(Path(value), f"{key}: {refusal.reason}", refusal.remedy)
    if not path.is_dir():
        reason = f"{key} is not a folder" if path.exists() else f"{key} does not exist"
        return Problem(path, reason, "Correct the path or create the folder")
    return None


def read_numbered(request: Request, path: Path, lines: list[TextLine]) -> Listing:
    """The listing of the prompts of ``path`` and its folders of numbered images."""
    listing = Listing(path)
    listing.rows = [Row(line.index, line.number, line.text or None) for line in lines]
    for line in lines:
        fault = None if line.text is None else text_fault(line.text, line.index)
        if fault is not None:
            reason, remedy = fault
            kept = "" if line.text else "; removing the line would renumber those after it"
            listing.add(line, reason, remedy + kept)
    if request.target_images_dir is not None:
        _attach_numbered(listing, lines, "target", request.target_images_dir)
    elif request.require_targets:
        remedy = "Set target_images_dir, or use no reward that compares with a target"
        listing.problems.append(Problem(path, "the targets have no folder: target_images_dir is not set", remedy))
    if request.needs_source:
        if request.source_images_dir is not None:
            _attach_numbered(listing, lines, "source", request.source_images_dir)
        else:
            remedy = "Set source_images_dir; image-to-image edits a source"
            listing.problems.append(Problem(path, "the sources have no folder: source_images_dir is not set", remedy))
    return listing


def _attach_numbered(listing: Listing, lines: list[TextLine], role: Role, folder_value: str | Path) -> None:
    """Give every row its image of ``folder`` and report the rows without one and the images without a row."""
    problem = folder_problem(folder_value, f"{role}_images_dir")
    if problem is not None:
        listing.problems.append(problem)
        return
    folder = Path(folder_value)
    files = _numbered_files(folder, role, listing.problems.append)
    for line, row in zip(lines, listing.rows, strict=True):
        found = files.pop(line.index, [])
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            reason = f"index {line.index} has {len(found)} {role} images in {folder}: {names}"
            listing.add(line, reason, "Keep one of them")
        elif not found:
            suffixes = ", ".join(NUMBERED_SUFFIXES)
            reason = f"index {line.index} has no {role} image {folder / str(line.index)} ({suffixes})"
            listing.add(line, reason, "Add the image")
        else:
            try:
                row.images[role] = resolve_below(folder, found[0])
            except PathRefused as refusal:
                listing.add(line, f"{role} image: {refusal.reason}", refusal.remedy)
    if not lines:
        return  # the prompts file itself is at fault; every image would be called an orphan
    left = [path for index in sorted(files) for path in files[index]]
    listing.problems += _without_prompt(left, role, f"{listing.path} ends at index {len(lines) - 1}")


def _without_prompt(images: list[Path], role: Role, end: str) -> list[Problem]:
    """A fault for each; of many, as of another set's folder, one for all."""
    shift = "a lost line shifts every pair after it"
    if len(images) <= FEW:
        remedy = f"Add its prompt line or remove the image; {shift}"
        return [Problem(path, f"{role} image has no prompt: {end}", remedy) for path in images]
    names = f"{images[0].name} to {images[-1].name}"
    reason = f"{len(images)} {role} images have no prompt ({names}): {end}"
    return [Problem(images[0].parent, reason, f"Add their prompt lines, or name the folder of these prompts; {shift}")]


def _numbered_files(folder: Path, role: Role, report: Callable[[Problem], None]) -> dict[int, list[Path]]:
    """Index -> images named by it. Hidden files and files without an image suffix are passed over."""
    files: dict[int, list[Path]] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        report(Problem(folder, f"cannot be listed: {error.strerror}", "Correct the folder's permissions"))
        return files
    for name in names:
        path = folder / name
        suffix = path.suffix.lower()
        if name.startswith("."):
            continue
        if suffix in _OTHER_IMAGE_SUFFIXES:
            allowed = ", ".join(NUMBERED_SUFFIXES)
            report(Problem(path, f"{role} image of an unsupported kind {suffix}", f"Convert it to one of {allowed}"))
        elif suffix in NUMBERED_SUFFIXES:
            stem = path.stem
            if stem.isascii() and stem.isdigit() and str(int(stem)) == stem:
                files.setdefault(int(stem), []).append(path)
            else:
                number = str(int(stem)) if stem.isascii() and stem.isdigit() else "<prompt line, from 0>"
                reason = f"{role} image has no prompt: its name is not a line number"
                report(Problem(path, reason, f"Rename it to {number}{suffix}, or move it elsewhere"))
    return files
