"""Pydantic's errors in the user's words: which entry, what it takes, what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from glm_training.config.docs.describe import Key, KeyPath, entry_type, plain, section_type, walk
from glm_training.config.loading.other_names import IN_PLACE_OF_SECTIONS, own_name
from glm_training.config.scalars import PATTERNS
from glm_training.utils.redaction import redact

UNKNOWN = ("extra_forbidden", "invalid_key")
"""Pydantic's error types for a key that the schema lacks."""

_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


@dataclass(frozen=True)
class Fault:
    """One entry that cannot stay as it is."""

    path: KeyPath
    message: str
    suggestion: str | None = None


@dataclass(frozen=True)
class _Place:
    """Where an error points: the entry, the section around it and, for a leaf of the schema, its key."""

    path: KeyPath
    section: type[BaseModel]
    prefix: str
    key: Key | None


def faults(details: list[ErrorDetails], tree: Any, schema: type[BaseModel]) -> list[Fault]:
    """One fault per faulty entry. Of the errors that the branches of a union give, the deepest ones count."""
    places = [(_place(detail["loc"], tree, schema), detail) for detail in details]
    found: dict[KeyPath, Fault] = {}
    for place, detail in places:
        deeper = any(other.path[: len(place.path)] == place.path != other.path for other, _ in places)
        if not deeper and place.path not in found:
            found[place.path] = _fault(place, detail, schema)
    return list(found.values())


def _place(loc: tuple[int | str, ...], tree: Any, schema: type[BaseModel]) -> _Place:
    section, prefix, path = schema, "", list[str]()
    entries: type[BaseModel] | None = None
    for depth, item in enumerate(loc, start=1):
        name = str(item)
        path.append(name)
        if entries is not None:  # a name of the user's, with a section below it
            section, prefix, entries = entries, f"{prefix}{name}.", None
            continue
        if name not in section.model_fields:
            return _Place(tuple(path), section, prefix, None)
        entries = entry_type(section.model_fields[name]) if depth < len(loc) else None
        if entries is not None:
            prefix = f"{prefix}{name}."
            continue
        below = section_type(section.model_fields[name])
        if below is None:
            key = Key(prefix + name, section.model_fields[name])
            return _Place((*path, *_inside(loc[depth:], _at(tree, path))), section, prefix, key)
        section, prefix = below, f"{prefix}{name}."
    return _Place(tuple(path), section, prefix, None)


def _at(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _inside(loc: tuple[int | str, ...], value: Any) -> list[str]:
    """The part of an error's location that lies in the user's mapping; the rest names branches of a union."""
    names = []
    for item in loc:
        if isinstance(value, dict) and item in value:
            names.append(str(item))
            value = value[item]
    return names


def _fault(place: _Place, detail: ErrorDetails, schema: type[BaseModel]) -> Fault:
    value = detail["input"]
    if place.key is not None:
        if detail["type"] == "missing":
            return Fault(place.path, f"missing; allowed: {place.key.allowed}.")
        inside = len(place.path) > len(place.key.path.split("."))
        weights = inside and "float" in str(place.key.field.annotation)
        allowed = "number > 0" if weights else place.key.allowed
        message = f"{_show(value)} is not allowed; allowed: {allowed}."
        return Fault(place.path, message, _remedy(value, place.key, detail))
    if place.path and place.path[-1] not in place.section.model_fields and detail["type"] in UNKNOWN:
        return Fault(place.path, "unknown key.", _similar(place, schema))
    keys = ", ".join(place.section.model_fields)
    message = f"{_show(value)} is not allowed; allowed: a section with the keys {keys}."
    return Fault(place.path, message, _key_of_that_name(place, value, schema))


def _key_of_that_name(place: _Place, value: Any, schema: type[BaseModel]) -> str | None:
    """Where a value belongs that stands in place of a section: `lora: true`, or `optimizer: lion`."""
    if isinstance(value, bool):
        return f"Write {{enabled: {plain(value)}}}." if "enabled" in place.section.model_fields else None
    meant = IN_PLACE_OF_SECTIONS.get(".".join(place.path), {}).get(type(value))
    if meant is not None and _is_one_word(value):
        return f"Write {meant.format(value)}."
    named = [key for key in walk(schema) if place.path and key.path.rsplit(".", 1)[-1] == place.path[-1]]
    options = [key.path for key in named if str(value).lower() in map(str, _options(key.field.annotation))]
    return f"There is {_listed(options)}." if options else None


def _is_one_word(value: object) -> bool:
    """Whether a value can be repeated as it is: it holds neither secrets nor what YAML reads as something else."""
    return re.fullmatch(r"[\w./~-]{1,100}", str(value)) is not None


def _listed(paths: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(f"`{path}`" for path in paths[:-1]), f"`{paths[-1]}`"]))


def _show(value: Any) -> str:
    text = plain(value) if value is None or isinstance(value, bool) else redact(repr(value))  # before it is cut
    return text if len(text) <= 60 else f"{text[:57]}..."


def _similar(place: _Place, schema: type[BaseModel]) -> str:
    """The same name in another section, or a similar one in this, or a similar one anywhere, or what there is."""
    name, here = place.path[-1], list(place.section.model_fields)
    paths = [key.path for key in walk(schema)]
    elsewhere = [path for path in paths if path.rsplit(".", 1)[-1] == name]
    below = [path for path in elsewhere if place.prefix and path.startswith(place.prefix)]
    others = own_name(name)
    if others is not None and not below:
        return f"Did you mean `{others}`?"
    if below or 0 < len(elsewhere) <= 2:
        return f"There is {_listed(below or elsewhere)}."
    close = get_close_matches(name, here, n=1)
    if close:
        return f"Did you mean `{place.prefix}{close[0]}`?"
    leaves = {path.rsplit(".", 1)[-1]: path for path in paths}
    close = get_close_matches(name, leaves, n=1, cutoff=0.75)
    if close:
        return f"Did you mean `{leaves[close[0]]}`?"
    return f"Known here: {', '.join(here)}."


def _remedy(value: Any, key: Key, detail: ErrorDetails) -> str | None:
    if detail["type"] == "multiple_of" and isinstance(value, int):
        step = int(detail["ctx"]["multiple_of"])
        low = value // step * step
        return f"The nearest are {low} and {low + step}." if low else f"The nearest is {step}."
    if detail["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if detail["type"] == "value_error":
        return f"{detail['ctx']['error']}."
    if isinstance(value, str):
        options = [str(option) for option in _options(key.field.annotation)]
        close = get_close_matches(value.lower(), options, n=1)
        return f"Did you mean `{close[0]}`?" if close else _as_older_yaml(value, detail["type"])
    if detail["type"] == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return "Write it in quotes."
    return None


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [option for part in get_args(annotation) for option in _options(part)] if get_origin(annotation) else []


def _as_older_yaml(text: str, error: str) -> str | None:
    """What to write in place of a text that is a number in quotes, or that YAML 1.1 took for a number or a truth."""
    if error == "bool_type" and text.lower() in _TRUTHS:
        return f"Write `{_TRUTHS[text.lower()]}`."
    if error not in ("int_type", "float_type"):
        return None
    if any(PATTERNS[name].match(text) for name in ("int", "float")):
        return "Write it without quotes."
    plain_digits = text.replace("_", "")
    if plain_digits != text and any(PATTERNS[name].match(plain_digits) for name in ("int", "float")):
        return f"Write {plain_digits}."
    return "Write it as one number." if re.fullmatch(r"[-+]?\d+(:\d+)+", text) else None
