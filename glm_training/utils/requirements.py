"""Lower bounds of the libraries whose internals this package relies on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Library:
    """A library that is asked for, `specifier` in pip's words ("" for any), and the version that is installed."""

    name: str
    specifier: str
    found: str | None
    fits: bool

    @property
    def problem(self) -> str:
        """What is wrong with it, in words, where it does not fit."""
        if self.found is None:
            return f"{self.name} is not installed (needs {self.specifier})"
        return f"{self.name} {self.found} is installed (needs {self.specifier})"


def libraries(extra: str = "") -> Iterator[Library]:
    """The libraries that this package needs, or those that the extra `extra` adds.

    Raises PackageNotFoundError where the package itself is not installed.
    """
    for line in requires("glm_training") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Library(requirement.name, str(requirement.specifier), None, False)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        yield Library(requirement.name, str(requirement.specifier), found, fits)


def check_requirements() -> None:
    """Raises ImportError listing every installed library that is missing or too old, with the command that mends it."""
    problems = [library.problem for library in libraries() if not library.fits]
    if problems:
        raise ImportError("glm_training cannot run here:\n  " + "\n  ".join(problems) + "\nrun: pip install -e .")
