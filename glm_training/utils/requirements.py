"""Lower bounds of the libraries whose internals this package relies on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def check_requirements() -> None:
    """Raises ImportError listing every installed library that is missing or too old, with the command that mends it."""
    problems = []
    for line in requires("glm_training") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed (needs {requirement.specifier})")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is installed (needs {requirement.specifier})")
    if problems:
        raise ImportError("glm_training cannot run here:\n  " + "\n  ".join(problems) + "\nrun: pip install -e .")
