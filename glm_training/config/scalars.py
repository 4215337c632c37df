"""Scalars of YAML 1.2's core schema: which plain words are no texts, to be read and to be quoted by.

`no` is a word, `1:30` a text, `010` is ten and `0o10` eight, and `1e-5` is a number: unlike in YAML 1.1, PyYAML's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
PATTERNS = {
    name: re.compile(rf"(?:{pattern})\Z")
    for name, pattern in {
        "null": r"~|null|Null|NULL|",
        "bool": r"true|True|TRUE|false|False|FALSE",
        "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "merge": "<<",
    }.items()
}
"""Plain scalars that are no texts, by the name of their tag; of two that match, the first counts."""


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10),
    "float": _float,
}
"""What a scalar that matches its pattern stands for."""


class StrictLoader(yaml.SafeLoader):
    """PyYAML's parser with these scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


class StrictDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _name, _pattern in PATTERNS.items():
    StrictLoader.add_implicit_resolver(TAG + _name, _pattern, None)
    StrictDumper.add_implicit_resolver(TAG + _name, _pattern, None)
