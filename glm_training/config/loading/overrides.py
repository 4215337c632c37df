"""What is laid over the data of a file: other files, and `key.path=value` from the command line."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import BaseModel

from glm_training.config.docs.describe import KeyPath, section_type, split_path
from glm_training.config.errors import Problem
from glm_training.config.loading.yaml_source import Source, Tree
from glm_training.config.loading.yaml_text import Fault, comment_after, read_yaml


def apply_override(source: Source, text: str, schema: type[BaseModel]) -> None:
    """Set one key from `key.path=value`; the value is YAML (`3`, `1e-5`, `null`, `[lpips, structure]`)."""
    origin = f"override `{text}`"
    key, equals, value_text = text.partition("=")
    path = split_path(key.strip(), schema)
    if not equals or not all(path):
        source.problems.append(
            Problem(origin, None, "", "not of the form key.path=value.", "For example: training.max_steps=100")
        )
        return
    document = read_yaml(value_text)
    if document.value is None and not document.faults and value_text.strip() not in ("null", "Null", "NULL", "~"):
        nothing = "nothing stands after `=`."  # as where a variable of the shell is empty
        document.faults.append(Fault(None, (), nothing, "Write `null` where that is meant."))
    comment = comment_after(value_text) if not document.faults else ""
    if comment:
        document.faults.append(Fault(None, (), f"`{comment}` would be left out as a comment.", "Quote the value."))
    for fault in document.faults:
        below = ".".join((key.strip(), *fault.path))
        message = fault.message.replace("not valid YAML", "the value is not valid YAML")
        source.problems.append(Problem(origin, None, below, message, fault.suggestion or "Quote it."))
    if not document.faults:
        set_key(source, path, document.value, origin)


def set_key(source: Source, path: KeyPath, value: Any, origin: str) -> None:
    """Put `value` at `path`, opening the sections on the way, and note `origin` as what set it."""
    source.tree = tree = deepcopy(source.tree)
    for depth, name in enumerate(path[:-1], start=1):
        if tree.get(name) is None:
            tree[name] = {}
            if path[:depth] not in source.lines:
                source.origins.setdefault(path[:depth], origin)
        tree = tree[name]
        if not isinstance(tree, dict):
            above = ".".join(path[:depth])
            source.problems.append(
                Problem(origin, None, ".".join(path), f"`{above}` is {tree!r}, which has no keys of its own.")
            )
            return
    tree[path[-1]] = value
    source.forget(path)
    source.origins[path] = origin


def lay_over(source: Source, top: Source, schema: type[BaseModel]) -> None:
    """Put another file over `source`: its keys win one by one, sections are merged. Its problems are kept too."""
    source.tree = deepcopy(source.tree)
    source.problems += top.problems
    _merge(source, source.tree, top, top.tree, schema, ())


def _merge(source: Source, below: Tree, top: Source, above: Tree, schema: type[BaseModel], path: KeyPath) -> None:
    for name, value in above.items():
        here = (*path, str(name))
        section = section_type(schema.model_fields[name]) if name in schema.model_fields else None
        known = below.get(name)
        if section is not None and value is None and name in below:
            continue  # a section whose lines are all commented out says nothing
        if section is not None and isinstance(known, dict) and isinstance(value, dict):
            _merge(source, known, top, value, section, here)
            continue
        below[name] = deepcopy(value)
        source.forget(here)
        for place, line in top.lines.items():
            if place[: len(here)] == here:
                source.lines[place], source.files[place] = line, top.file
