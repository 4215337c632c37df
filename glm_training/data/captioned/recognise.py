"""Which layout a path is, by its content, and the sets of a run opened together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from glm_training.data.captioned.layouts import folder, listing, numbered
from glm_training.data.captioned.layouts.tables import arrow, records
from glm_training.data.captioned.layouts.tables.columns import ColumnsMissing, columns_of, names_pictures
from glm_training.data.captioned.layouts.tables.text_tables import table_head
from glm_training.data.captioned.layouts.tars import tar_set
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import ImageSet
from glm_training.data.captioned.sniff import (
    TABLE_SUFFIXES,
    first_lines,
    kind_in_folder,
    kind_of,
    may_list,
    own_files,
    some_files,
    walk_below,
)
from glm_training.data.paths import PathRefused, local_path
from glm_training.data.problems import DataError, Problem, correct_path
from glm_training.data.text_lines import UNREAD_IMAGE

LAYOUTS: tuple[ModuleType, ...] = (folder, records, numbered, tar_set, listing, arrow)
"""Each has NAME, in words; in the order of how common they are."""

_WITH_SOURCES = (records.NAME, numbered.NAME, arrow.NAME, tar_set.NAME)
EDITS = (
    "a table with the columns source, target and prompt, a prompts.txt with source_images beside target_images, or "
    "tars with KEY.source.jpg"
)
"""Layouts of edits, in words."""

_TAR_BESIDE = Problem(Path(), "it is a tar among pictures", "Put it into a folder of its own, and name that too")
_TEXTS = ("text", "JSON object", "JSON list")
_PARQUET = "a Parquet table"
_NEAREST = {"image": folder, "JSON object": listing, "text": folder, "empty": tar_set}


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
        if path.exists():
            opened = _open_folder(options, reading) if path.is_dir() else _open_file(options, reading)
            if reading.sources and opened.layout not in _WITH_SOURCES:
                told = f"is read as {opened.layout}: no pictures to edit"
                raise DataError([Problem(path, told, f"Give {EDITS}, or train in mode t2i")])
            if options.split is not None and opened.layout != arrow.NAME:
                told = f"is read as {opened.layout}: that has no splits"
                raise DataError([Problem(path, told, f"Name the file or folder of {options.split}, and remove split")])
            return opened
        if arrow.may_be_hub_id(path):
            return arrow.open_set(options, reading, ())
        pattern = any(mark in str(path) for mark in "{*?")
        hint = "Name the folder, it takes all tars in it" if pattern else correct_path(path)
        raise DataError([Problem(path, "there is no such file or folder", hint)])
    except PathRefused as refusal:
        raise DataError([Problem(path, refusal.reason, refusal.remedy)]) from refusal
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError([Problem(path, f"cannot be read: {reason}", "Correct the path or its permissions")]) from error


def _open_file(options: SetOptions, reading: Reading) -> ImageSet:
    path = options.path
    kind = kind_of(path)
    if kind == "tar":
        return tar_set.open_set(options, reading)
    if kind == _PARQUET:
        return arrow.open_set(options, reading, [path])
    if _is_record_table(path, kind, options):
        return records.open_set(options, reading, [path])
    if kind == "JSON list":
        return listing.open_set(options, reading)
    if kind == "text" and numbered.claims(path):
        return numbered.open_set(options, reading, path)
    raise DataError([_unknown(options, [path], [kind])])


def _open_folder(options: SetOptions, reading: Reading) -> ImageSet:
    """By what lies in the folder itself; where that tells nothing, by what lies in those below."""
    path = options.path
    if any((path / name).is_file() for name in arrow.MARKS):
        return arrow.open_set(options, reading, [])
    own = may_list(path, own_files(path))
    files = [*dict.fromkeys([*some_files(path), *own])]
    kinds = [kind_in_folder(file) for file in files]
    alone = folder.PicturesAlone(options, reading, files, kinds)
    found = _by_files(options, reading, files, kinds, own, alone)
    if found is None and (text := _prompts_text(own)) is not None:
        return numbered.open_set(options, reading, text)
    if found is None:
        files, kinds = alone.with_those_below
        found = _by_files(options, reading, files, kinds, [*own, *_below(path)], alone)
    if found is None:
        raise DataError([_unknown(options, files, kinds)])
    return found


def _by_files(
    options: SetOptions,
    reading: Reading,
    files: Sequence[Path],
    kinds: Sequence[str],
    may_be_tables: Sequence[Path],
    alone: folder.PicturesAlone,
) -> ImageSet | None:
    """What some `files` of a folder, of these `kinds`, say that it is."""
    open_to = [file for file in may_be_tables if file not in alone.not_read]
    tables = [file for file in open_to if _is_record_table(file, kind_of(file), options)]
    parquet = [file for file in open_to if kind_of(file) == _PARQUET]
    archives = _of_kind("tar", files, kinds)
    claims: list[tuple[list[Path], Callable[[], ImageSet]]] = [
        (archives, lambda: tar_set.open_set(options, reading)),
        (tables, lambda: _open_tables(options, reading, tables, alone)),
        (parquet, lambda: arrow.open_set(options, reading, parquet)),
        (_of_kind("JSON list", files, kinds), lambda: listing.open_set(options, reading)),
    ]
    for claimed, opened in claims:
        if not claimed:
            continue
        try:
            return opened()
        except DataError as error:
            if not alone.are_there():
                raise
            why = DataError([_TAR_BESIDE]) if claimed is archives else error
            alone.not_read |= {file: folder.why_not_read(options.path, file, why) for file in claimed}
    if "image" not in kinds:
        return None
    return _open_pictures(options, reading, may_be_tables, alone)


def _of_kind(wanted: str, files: Sequence[Path], kinds: Sequence[str]) -> list[Path]:
    return [file for file, kind in zip(files, kinds, strict=True) if kind == wanted]


def _open_tables(
    options: SetOptions, reading: Reading, tables: Sequence[Path], alone: folder.PicturesAlone
) -> ImageSet:
    """The tables without those that name no picture that is there and are not even named like tables: a README, say.
    Raises DataError."""
    try:
        together = records.open_set(options, reading, tables)
        if not together.idle_tables():
            return together
    except DataError:
        if len(tables) == 1:
            raise
    others: dict[Path, Problem] = {}
    for table in tables:
        try:
            records.open_set(options, reading, [table])
        except DataError as error:
            if table.suffix.lower() not in TABLE_SUFFIXES or alone.are_there():
                others[table] = folder.why_not_read(options.path, table, error)
    used = [table for table in tables if table not in others]
    opened = records.open_set(options, reading, used or tables)
    opened.remarks += _not_read(options.path, list(others.values()))
    return opened


def _open_pictures(
    options: SetOptions, reading: Reading, may_be_tables: Sequence[Path], alone: folder.PicturesAlone
) -> ImageSet:
    """The folder of pictures; what else lies in it and looks like a table is told."""
    passed = dict(alone.not_read)
    if reading.captions:
        unread = [file for file in may_be_tables if file.suffix.lower() in TABLE_SUFFIXES and file not in passed]
        passed |= {file: Problem(file, *_no_table(file)) for file in unread}
    problems = list(passed.values())
    try:
        opened = folder.open_set(options, reading, passed)
    except DataError as error:
        raise DataError([*error.problems, *(problems[:3] if reading.captions else [])]) from error
    opened.remarks += _not_read(options.path, problems)
    return opened


def _not_read(path: Path, problems: Sequence[Problem]) -> list[str]:
    """One remark on files that are not read."""
    if not problems:
        return []
    first = problems[0]
    line = "" if first.line is None else f"line {first.line} "
    more = f"; nor are {len(problems) - 1} more" if len(problems) > 1 else ""
    return [f"{path}: {first.path.relative_to(path)} is not read: {line}{first.reason}{more}"]


def _is_record_table(path: Path, kind: str, options: SetOptions) -> bool:
    head = table_head(path) if kind in _TEXTS else None
    return head is not None and names_pictures(head.columns, options.cap_source)


def _below(path: Path) -> list[Path]:
    """What may list pictures in the folders below `path`."""
    return [
        file for parent, names in walk_below(path) if Path(parent) != path for file in may_list(Path(parent), names)
    ]


def _prompts_text(files: Sequence[Path]) -> Path | None:
    """The prompts of a folder of numbered pictures: its only text that is one, or the one that is named so."""
    texts = [file for file in files if kind_of(file) == "text" and numbered.claims(file)]
    named = [file for file in texts if file.stem.lower() == "prompts"]
    return next(iter(named or texts), None)


def _no_table(path: Path) -> tuple[str, str]:
    """Why a file that is named like a table says nothing of captions, and the remedy."""
    kind = kind_of(path)
    head = table_head(path) if kind in _TEXTS else None
    if kind not in _TEXTS:
        return f"is no table that could have the captions but {_in_words(kind)}", "Save it as UTF-8 text"
    if head is None:
        return f"is no table that could have the captions; it begins {first_lines(path)}", f"Write {records.NAME}"
    try:
        columns_of(head.columns, None)
    except ColumnsMissing as lacking:
        return str(lacking), lacking.remedy
    return f"is read in a folder with its pictures alone; it begins {first_lines(path)}", f"Write {records.NAME}"


def _unknown(options: SetOptions, files: Sequence[Path], kinds: Sequence[str]) -> Problem:
    """What a path that is no layout begins with, and the layout that is nearest."""
    path = options.path
    known = "; or ".join(layout.NAME for layout in LAYOUTS)
    if not files:
        return Problem(path, "is an empty folder", f"Give {known}")
    heads = [(file, table_head(file)) for file, kind in zip(files, kinds, strict=True) if kind in _TEXTS]
    table = next((file for file, head in heads if head is not None and len(head.columns) > 1), None)
    if table is not None and (path.is_file() or table.suffix.lower() in TABLE_SUFFIXES):
        reason, remedy = _no_table(table)
        return Problem(table, reason, remedy)
    if path.is_file() and kinds[0] == "image":
        return Problem(path, "is one picture", f"Name the folder it lies in: {folder.NAME}")
    if "unread image" in kinds:
        one = files[kinds.index("unread image")]
        rest = kinds.count("unread image") - 1
        more = f"; so are {rest} more here" if rest else ""
        return Problem(one, UNREAD_IMAGE[0] + more, UNREAD_IMAGE[1])
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
