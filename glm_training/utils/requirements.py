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
    """Raises ImportError listing every installed library that is missing or too old, with the command that mends it; or
    where torchvision is of another build than torch, which other libraries tell in words of their own."""
    problems = [library.problem for library in libraries() if not library.fits]
    if problems:
        raise ImportError("glm_training cannot run here:\n  " + "\n  ".join(problems) + "\nrun: pip install -e .")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        pair = f"torchvision {version('torchvision')} does not load beside torch {version('torch')}"
        raise ImportError(
            f"{pair}: {error}\nBoth have to come from one place (of CPU or of CUDA), in versions that belong together. "
            "Run: pip install --force-reinstall torch torchvision"
        ) from error
