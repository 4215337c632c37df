"""`requirements-lowest.txt` pins what pyproject.toml allows at the least."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TOOLS = {"pytest", "pytest-xdist", "ruff", "mypy", "types-pyyaml", "mkdocs-material"}
"""What tests with and not what runs with: the newest may be taken."""


def test_each_lower_bound_is_what_the_lowest_environment_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    bounds = {}
    for requirement in map(Requirement, required):
        if requirement.name.lower() not in TOOLS:
            (low,) = [one.version for one in requirement.specifier if one.operator == ">="]
            bounds[requirement.name.lower()] = Version(low)
    lines = (ROOT / "requirements-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned.items()} == bounds
