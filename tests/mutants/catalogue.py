"""Single mistakes that the tests must notice: a piece of the package's text, what is put in its place, and what that
breaks."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import lists

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """`file` lies below glm_training/; `old` stands there exactly once and gives way to `new`. `tests`: the test files
    (or single tests) that should notice, most likely ones first."""

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        return Path("glm_training") / self.file

    def applied(self, root: Path = ROOT) -> str:
        """The file's text with the mistake in it. Raises ValueError for a mutation that no longer fits the tree."""
        path = root / self.path
        if not path.is_file():
            raise ValueError(f"{self.path} is gone")
        text = path.read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.path} has {count} times {self.old!r}")
        changed = text.replace(self.old, self.new)
        if changed == text:
            raise ValueError(f"{self.path}: {self.old!r} gives way to itself")
        ast.parse(changed)
        return changed

    def __str__(self) -> str:
        return f"{self.file}: {self.breaks}"


def misfit(mutation: Mutation) -> str | None:
    """Why a mutation no longer fits the tree; None where it does."""
    try:
        mutation.applied()
    except (ValueError, SyntaxError) as error:
        return str(error)
    gone = [name for name in mutation.tests if not (ROOT / name.split("::")[0]).exists()]
    return f"{gone[0]} is gone" if gone else None


def mutations() -> list[Mutation]:
    """All of them, in the order of the lists."""
    found: list[Mutation] = []
    for module in sorted(module.name for module in pkgutil.iter_modules(lists.__path__)):
        found += importlib.import_module(f"{lists.__name__}.{module}").MUTATIONS
    return found


def of(file: str, tests: str | tuple[str, ...], *mistakes: tuple[str, str, str]) -> list[Mutation]:
    """The mistakes (old, new, what it breaks) of one file that the same tests should notice; `tests` lie below
    tests/."""
    named = (tests,) if isinstance(tests, str) else tests
    return [Mutation(file, old, new, breaks, tuple(f"tests/{name}" for name in named)) for old, new, breaks in mistakes]
