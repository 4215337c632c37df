"""Which layout a path is, by its content, and the sets of a run opened together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from glm_training.data.captioned.layouts import folder, listing, tars
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import ImageSet
from glm_training.data.captioned.sniff import first_lines, kind_in_folder, kind_of, some_files, some_files_below
from glm_training.data.paths import PathRefused, local_path
from glm_training.data.problems import DataError, Problem

LAYOUTS: tuple[ModuleType, ...] = (tars, listing, folder)
"""Asked in this order: each has NAME (in words), `claims` and `open_set`."""

_TEXTS = ("text", "JSON object")
_NEAREST = {"image": folder, "JSON object": listing, "text": folder, "empty": tars}


def open_sets(options: Sequence[SetOptions], reading: Reading) -> list[ImageSet]:
    """Each set, of the layout that its path is; raises DataError with what is wrong with any of them."""
    problems: list[Problem] = []
    found: list[ImageSet] = []
    for one in options:
        try:
            found.append(_open(one, reading))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def _open(options: SetOptions, reading: Reading) -> ImageSet:
    path = options.path
    try:
        local_path(str(path))
        if not path.exists():
            pattern = any(mark in str(path) for mark in "{*?")
            hint = "name the folder, it takes all tars in it" if pattern else "correct the path"
            raise DataError([Problem(path, "there is no such file or folder", hint.capitalize())])
        files, kinds, claimed = _looked_at(path)
        if claimed is None or (claimed is folder and path.is_file()):
            raise DataError([_unknown(options, files, kinds)])
        opened: ImageSet = claimed.open_set(options, reading)
    except PathRefused as refusal:
        raise DataError([Problem(path, refusal.reason, refusal.remedy)]) from refusal
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError([Problem(path, f"cannot be read: {reason}", "Correct the path or its permissions")]) from error
    return opened


def _looked_at(path: Path) -> tuple[list[Path], list[str], ModuleType | None]:
    """Files of a path, their kinds, and the layout that they are: by what lies in a folder itself, else below it."""
    files: list[Path] = []
    kinds: list[str] = []
    for some in (some_files, some_files_below) if path.is_dir() else (lambda file: [file],):
        more = some(path)
        told = [kind_in_folder(file) if path.is_dir() else kind_of(file) for file in more]
        files, kinds = files + more, kinds + told
        claimed = next((layout for layout in LAYOUTS if layout.claims(told)), None)
        if claimed is not None:
            return files, kinds, claimed
    return files, kinds, None


def _unknown(options: SetOptions, files: Sequence[Path], kinds: Sequence[str]) -> Problem:
    """What a path that is no layout begins with, and the layout that is nearest."""
    path = options.path
    known = "; or ".join(layout.NAME for layout in LAYOUTS)
    if not files:
        return Problem(path, "is an empty folder", f"Give {known}")
    if path.is_file() and kinds[0] == "image":
        return Problem(path, "is one picture", f"Name the folder it lies in: {folder.NAME}")
    if any("compressed" in kind for kind in kinds):
        name = files[next(place for place, kind in enumerate(kinds) if "compressed" in kind)].name
        return Problem(path, f"{name} is compressed", "Unpack it: a compressed tar has no places to read from")
    nearest = next((layout for kind in kinds for name, layout in _NEAREST.items() if kind == name), None)
    remedy = f"The nearest layout: {nearest.NAME}" if nearest is not None else f"Give {known}"
    if not path.is_dir():
        shown = f", which begins {first_lines(path)}" if kinds[0] in _TEXTS else ""
        return Problem(path, f"is no set of pictures but {_in_words(kinds[0])}{shown}", remedy)
    listed = ", ".join(f"{file.name} ({kind})" for file, kind in list(zip(files, kinds, strict=True))[:4])
    texts = [file for file, kind in zip(files, kinds, strict=True) if kind in _TEXTS]
    shown = f"; {texts[0].name} begins {first_lines(texts[0])}" if texts else ""
    return Problem(path, f"is a folder that holds no pictures: {listed}{shown}", remedy)


def _in_words(kind: str) -> str:
    words = {"text": "a text", "JSON object": "a JSON object", "empty": "an empty file", "unknown": "of no known kind"}
    return words.get(kind, kind)
