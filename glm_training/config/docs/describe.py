"""The schema in words: what a key takes. Used by error messages, the table in the documentation and `--help`."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

KeyPath = tuple[str, ...]

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    list[str]: "list of texts",
    dict[str, float]: "mapping of text to number",
}


@dataclass(frozen=True)
class Key:
    """One leaf of the schema: its dotted path and its field."""

    path: str
    field: FieldInfo

    @property
    def description(self) -> str:
        """One line: meaning, units, what null does."""
        return self.field.description or ""

    @property
    def allowed(self) -> str:
        """The values it takes, as `integer >= 1 or null`."""
        return extra_text(self.field, "allowed") or allowed_text(self.field)

    @property
    def default(self) -> str:
        """Its default as it would stand in a file, or in words where it depends on other keys."""
        return extra_text(self.field, "default_text") or f"`{plain(self.field.default)}`"


def section_type(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section, None for a leaf."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def entry_type(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the sections in a field that maps names of the user's to sections, None for any other."""
    values = get_args(field.annotation)[1:] if get_origin(field.annotation) is dict else ()
    return next((kind for kind in values if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every leaf below `schema`, in the order of the classes."""
    for name, field in schema.model_fields.items():
        section = section_type(field)
        if section is None:
            yield Key(prefix + name, field)
        else:
            yield from walk(section, f"{prefix}{name}.")


def split_path(key: str, schema: type[BaseModel]) -> KeyPath:
    """The parts of a dotted path. Below a leaf (`reward.weights.my.module:Class`) the rest is one name, unless the leaf
    maps names to sections."""
    parts = key.split(".")
    section: type[BaseModel] | None = schema
    for depth, name in enumerate(parts, start=1):
        if section is None or name not in section.model_fields:
            break
        field = section.model_fields[name]
        section = section_type(field)
        if section is None and depth < len(parts) and entry_type(field) is None:
            return (*parts[:depth], ".".join(parts[depth:]))
    return tuple(parts)


def extra_text(field: FieldInfo, name: str) -> str | None:
    """A wording of its own that the field carries for the documentation."""
    extra = field.json_schema_extra
    return str(extra[name]) if isinstance(extra, dict) and name in extra else None


def plain(value: Any) -> str:
    """A value in YAML's flow notation, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    return str(value)


def allowed_text(field: FieldInfo) -> str:
    """What the field's type and bounds let through."""
    words = [word for member in _members(field.annotation) for word in _words(member, field)]
    return " or ".join(words) if len(words) <= 2 else f"{', '.join(words[:-1])} or {words[-1]}"


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, without what `Annotated` adds to them."""
    if get_origin(annotation) in (types.UnionType, Union):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [get_args(annotation)[0]] if get_origin(annotation) is Annotated else [annotation]


def _words(member: Any, field: FieldInfo) -> list[str]:
    if get_origin(member) is Literal:
        return [f"`{value}`" for value in get_args(member)]
    if member in (int, float):
        return [WORDS[member] + _bounds(field)]
    not_empty = any(isinstance(item, MinLen) for item in field.metadata) and member is not type(None)
    return [("non-empty " if not_empty else "") + WORDS[member]]


def _bounds(field: FieldInfo) -> str:
    bounds = []
    for item in field.metadata:
        match item:
            case Gt(gt=bound):
                bounds.append(f"> {bound}")
            case Ge(ge=bound):
                bounds.append(f">= {bound}")
            case Lt(lt=bound):
                bounds.append(f"< {bound}")
            case Le(le=bound):
                bounds.append(f"<= {bound}")
            case MultipleOf(multiple_of=step):
                bounds.append(f"divisible by {step}")
    return f" {' and '.join(bounds)}" if bounds else ""
