"""The files between the stages: settings that must not change, records of a judge, results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_training.evaluation.suites.protocol import EvaluationError, Record

SETTINGS, RECORDS, RESULTS, LINES = "settings.json", "records.jsonl", "results.json", "results.jsonl"
_PART = "records.part-*.jsonl"


def read_settings(out: Path) -> dict[str, Any]:
    """What `out` remembers: "pictures" and "judge", each once there was any. Raises EvaluationError for a file that is
    no settings."""
    path = out / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); restore it, or give another --out") from error
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise EvaluationError(f"{path} is not what glm-train evaluate wrote; give another --out")
    return settings


def settle(out: Path, section: str, settings: Mapping[str, Any], *, remedy: str) -> None:
    """Writes `settings` as a `section` of the settings of `out`, or finds them there.

    Raises EvaluationError, naming every difference, where others are there; nothing is written then.
    """
    known = read_settings(out)
    if not known:
        _refuse_strangers(out)
    wanted = json.loads(json.dumps(settings))
    if section in known:
        differences = _differences(known[section], wanted)
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise EvaluationError(f"{out / SETTINGS} says that other settings made what is there:\n{listed}\n{remedy}")
        return
    write_whole(out / SETTINGS, json.dumps({**known, section: wanted}, indent=1, ensure_ascii=False) + "\n")


def _refuse_strangers(out: Path) -> None:
    """Raises EvaluationError where files lie that an evaluation would write over, or take for its own."""
    found = [name for name in (RECORDS, RESULTS, LINES) if (out / name).exists()]
    if found:
        raise EvaluationError(f"{out / found[0]} is there, and no {SETTINGS} says what made it: give another --out")


def check_settled(out: Path, section: str, settings: Mapping[str, Any], *, remedy: str) -> None:
    """Raises EvaluationError, naming every difference, where `out` remembers other values of these `settings`; what it
    does not remember is none. And where it remembers nothing of what is there."""
    settings_there = read_settings(out)
    if not settings_there:
        _refuse_strangers(out)
    known = settings_there.get(section, {})
    wanted = {name: value for name, value in json.loads(json.dumps(settings)).items() if name in known}
    differences = _differences({name: known[name] for name in wanted}, wanted)
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise EvaluationError(f"{out / SETTINGS} says that other settings made what is there:\n{listed}\n{remedy}")


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = [*known, *(name for name in wanted if name not in known)]
    return [
        f"{name}: {_shown(known, name)} there, {_shown(wanted, name)} now"
        for name in names
        if known.get(name) != wanted.get(name) or (name in known) != (name in wanted)
    ]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "nothing"


def digest(content: Any) -> str:
    """Of what JSON can say: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, text: str) -> None:
    """`text` under `path` whole, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def read_records(path: Path) -> list[Record]:
    """The whole lines of a file of records; a last line that a kill has torn is left out. None there: none.

    Raises EvaluationError, naming the line, for anything else that is no record.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("picture"), str):
            remedy = "delete the line and run the judge again, which does what is missing"
            raise EvaluationError(f'{path}:{number}: is no record (a JSON object with "picture"); {remedy}')
        records.append(record)
    return records


def merge_records(out: Path, order: Sequence[str]) -> dict[str, Record]:
    """All records of `out` by picture, those that processes left in parts of their own moved into the one file, in the
    `order` of their pictures. A later record of a picture takes the place of an earlier one."""
    parts = sorted(out.glob(_PART))
    found: dict[str, Record] = {}
    for path in (out / RECORDS, *parts):
        found |= {record["picture"]: record for record in read_records(path)}
    places = {name: place for place, name in enumerate(order)}
    names = sorted(found, key=lambda name: (places.get(name, len(places)), name))
    merged = {name: found[name] for name in names}
    if parts:
        write_whole(out / RECORDS, lines_of(merged.values()))
        for path in parts:
            path.unlink()
    return merged


def lines_of(records: Iterable[Record]) -> str:
    """Records as lines of JSON."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


class PartFile:
    """Where one process puts its records until they are merged: each is there whole, or torn at the end of the file."""

    def __init__(self, out: Path, rank: int) -> None:
        self.path = out / _PART.replace("*", f"{rank:05d}")

    def append(self, records: Sequence[Record]) -> None:
        """Raises OSError where the disk does not take them."""
        with self.path.open("ab") as file:
            file.write(lines_of(records).encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
