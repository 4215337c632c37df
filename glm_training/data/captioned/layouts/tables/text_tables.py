"""Tables in text: JSON lines, one JSON list of records, one JSON object of captions by picture, or CSV with a header,
told by how they begin."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from glm_training.data.captioned.layouts.tables.columns import plain
from glm_training.data.json_records import Doubled, keeping_pairs
from glm_training.data.problems import DataError, Problem

_HEAD = 1 << 16
_BOM = b"\xef\xbb\xbf"
_BY_PICTURE = re.compile(r'\{\s*"[^"\n]+\.(?:png|jpe?g|webp|bmp|gif|tiff?)"\s*:\s*(?=["{])', re.IGNORECASE)
"""How captions by picture begin: {"a.png": "a dot", ...}, or {"a.png": {"caption": "a dot"}, ...}."""

_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class TableHead:
    """How a table begins: its kind, the names of its columns, and of a CSV what is between them."""

    kind: Literal["json lines", "json list", "json mapping", "csv"]
    columns: tuple[str, ...]
    delimiter: str = ","


@dataclass(frozen=True)
class TableRow:
    """A record: its line, or of JSON that is no lines its number from 0, and what it says; or why it says nothing."""

    number: int
    values: dict[str, object] | None
    fault: str = ""


def table_head(path: Path) -> TableHead | None:
    """How the table at `path` begins; None where it is none. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(_HEAD).removeprefix(_BOM)
    text = data.decode("utf-8", "replace").lstrip()
    if "\0" in text:
        return None
    if text.startswith("["):
        record = _first_record(text[1:].lstrip())
        return None if record is None else TableHead("json list", tuple(record))
    first = text.partition("\n")[0].rstrip("\r")
    named = _BY_PICTURE.match(text)
    if named is not None:
        record = _first_record(text[named.end() :])
        return TableHead("json mapping", ("image", "caption") if record is None else ("image", *record))
    if text.startswith("{"):
        record = _first_record(first)
        return None if record is None else TableHead("json lines", tuple(record))
    return _csv_head(first)


def _first_record(text: str) -> dict[str, object] | None:
    try:
        value = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _csv_head(line: str) -> TableHead | None:
    """A header has at least two names, none of them twice, and none empty but the first: that is how pandas numbers
    rows."""
    for delimiter in _DELIMITERS:
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
        except csv.Error:
            continue
        different = {plain(name) for name in names}
        is_text = "\ufffd" not in line
        if is_text and len(names) > 1 and len(different) == len(names) and "" not in names[1:]:
            return TableHead("csv", tuple(names), delimiter)
    return None


def table_rows(path: Path, head: TableHead) -> Iterator[TableRow]:
    """Every record of the table at `path`. Raises DataError where it stops being one."""
    if head.kind in ("json list", "json mapping"):
        return _whole_rows(path)
    return _line_rows(path) if head.kind == "json lines" else _csv_rows(path, head)


def _line_rows(path: Path) -> Iterator[TableRow]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(_BOM).strip() if number == 1 else raw.strip()
            if not line:
                continue
            try:
                value = json.loads(line, object_pairs_hook=keeping_pairs)
            except UnicodeDecodeError as error:
                yield TableRow(number, None, f"is not UTF-8 (byte {error.start})")
            except (ValueError, RecursionError) as error:
                yield TableRow(number, None, f"is not JSON: {error}")
            else:
                yield _record(number, value)


def _whole_rows(path: Path) -> Iterator[TableRow]:
    try:
        values = json.loads(path.read_bytes().removeprefix(_BOM), object_pairs_hook=keeping_pairs)
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error.msg} at column {error.colno}"
        raise DataError(
            [Problem(path, reason, "Correct it, or write one record per line", line=error.lineno)]
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError([Problem(path, f"is not readable as JSON: {error}", "Correct it")]) from error
    if isinstance(values, dict):
        return _by_picture(values.pairs if isinstance(values, Doubled) else list(values.items()))
    return (_record(number, value) for number, value in enumerate(values))


def _by_picture(pairs: list[tuple[str, object]]) -> Iterator[TableRow]:
    """Records of captions by picture. Of a name that comes again nobody knows which caption is meant."""
    places: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(pairs):
        places.setdefault(name, []).append(number)
    for number, (name, told) in enumerate(pairs):
        others = [str(place) for place in places[name] if place != number]
        if others:
            yield TableRow(number, None, f"{name!r} is named by record {' and '.join(others)}, too")
        elif isinstance(told, str):
            yield TableRow(number, {"image": name, "caption": told})
        else:
            record = _record(number, told)
            yield record if record.values is None else replace(record, values={"image": name, **record.values})


def _record(number: int, value: object) -> TableRow:
    if isinstance(value, Doubled):
        return TableRow(number, None, f"gives {value.twice[0]!r} twice")
    if isinstance(value, dict):
        return TableRow(number, value)
    return TableRow(number, None, f"is no record but a JSON {type(value).__name__}")


def _csv_rows(path: Path, head: TableHead) -> Iterator[TableRow]:
    names = head.columns
    with path.open("rb") as file:
        texts = (raw.removeprefix(_BOM).decode("utf-8") for raw in file)  # by line: an error names its own
        # strict: a quote that is not closed would swallow the records after it, one before a text be lost
        reader = csv.reader(texts, delimiter=head.delimiter, strict=True)
        began = 1
        try:
            header = next(reader)
            while not header:  # blank lines before it
                header = next(reader)
            while True:
                began = reader.line_num + 1
                fields = next(reader, None)
                if fields is None:
                    return
                if not any(fields):
                    continue
                if len(fields) != len(names):
                    reason = f"has {len(fields)} fields and the header {len(names)}: text with {head.delimiter!r} in "
                    yield TableRow(reader.line_num, None, f"{reason}it stands in double quotes")
                else:
                    yield TableRow(reader.line_num, dict(zip(names, fields, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            told = "is not UTF-8", "Save it as UTF-8", reader.line_num + 1
            if isinstance(error, csv.Error):
                quoting = "A text with quotes stands in double quotes, each of its own twice"
                told = f"begins a record that is no CSV: {error}", quoting, began
            raise DataError([Problem(path, *told[:2], line=told[2])]) from error
