"""Versions of the libraries against those that are asked for and those that CI tested, and the extras."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.version import Version

from glm_training.doctor.commands import ROOT, is_clone, pip_install
from glm_training.doctor.findings import Finding, failed, note, ok
from glm_training.utils.requirements import Library, libraries

NAME = "libraries"
_TOLD = ("torch", "torchvision", "transformers", "diffusers", "peft", "accelerate", "rapidocr", "lpips")
EXTRAS = {
    "wandb": "logging.use_wandb",
    "swanlab": "logging.use_swanlab",
    "trackio": "logging.use_trackio",
    "bitsandbytes": "weights or moments in 8 bits",
    "prodigy": "the optimizer prodigy",
    "lion": "the optimizer lion",
    "schedulefree": "the optimizer adamw_schedule_free",
    "pytesseract": "OCR by tesseract",
    "datasets": "data sets of the hub",
    "hps": "the metric hps_v2, and dmdr",
    "evaluation": "glm-train evaluate --suite reconstruction",
}
"""The extras of pyproject.toml, and what asks for each."""


def installed() -> Iterator[Finding]:
    """The libraries that every run needs."""
    try:
        found = list(libraries())
    except PackageNotFoundError:
        yield failed(NAME, f"the package is used from {ROOT} without being installed", pip_install("-e", str(ROOT)))
        return
    yield from _lacking(found)
    if all(each.fits for each in found):
        told = ", ".join(f"{each.name} {each.found}" for each in found if each.name in _TOLD)
        yield ok(NAME, told, versions={each.name: each.found for each in found})
    newer = _newer_than_tested(found)
    if newer:
        told = ", ".join(newer)
        yield note(
            "versions", f"newer than what CI tested: {told}", [*pip_install(), "-r", str(ROOT / "requirements.txt")]
        )


def extras(wanted: Iterable[str]) -> Iterator[Finding]:
    """Those extras that a configuration needs."""
    for extra in wanted:
        found = list(libraries(extra))
        yield from _lacking(found, f", for {EXTRAS[extra]}")
        if all(each.fits for each in found):
            told = ", ".join(f"{each.name} {each.found}" for each in found)
            yield ok(f"extra {extra}", f"{told}, for {EXTRAS[extra]}")


def absent_extras() -> Iterator[Finding]:
    """The extras that are not here, in one line: a run that needs one says so."""
    try:
        absent = [extra for extra in EXTRAS if not all(each.fits for each in libraries(extra))]
    except PackageNotFoundError:
        return
    if absent:
        own = ["-e", f"{ROOT}[EXTRA]"] if is_clone() else ["glm_training[EXTRA]"]
        told = ", ".join(f"{extra} ({EXTRAS[extra]})" for extra in absent)
        yield note("extras", f"absent: {told}. Where one is needed:", pip_install(*own), absent=absent)


def _lacking(found: Iterable[Library], reason: str = "") -> Iterator[Finding]:
    for each in found:
        if not each.fits:
            message = each.problem.removeprefix(f"{each.name} ") + reason
            yield failed(each.name, message, _upgrade(each))


def _upgrade(library: Library) -> list[str]:
    """Where PYTHONPATH's folder has it, pip would leave the old version's record beside the new one's."""
    place = None if library.found is None else Path(str(distribution(library.name).locate_file("")))
    command = pip_install(f"{library.name}{library.specifier}", place=place)
    if place is None or "--target" not in command:
        return command
    stem = _plain(library.name)
    records = [path for path in place.glob("*.dist-info") if _plain(path.name.partition("-")[0]) == stem]
    return ["rm", "-r", *(shlex.quote(str(path)) for path in sorted(records)), "&&", *command]


def _newer_than_tested(found: Iterable[Library]) -> list[str]:
    """Of a clone, whose requirements.txt has the versions of CI."""
    file = ROOT / "requirements.txt"
    if not (is_clone() and file.is_file()):
        return []
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    tested = {_plain(name): version for name, version in pinned.items()}
    return [
        f"{each.name} {each.found} ({tested[_plain(each.name)]})"
        for each in found
        if each.found is not None
        and _plain(each.name) in tested
        and Version(each.found).release > Version(tested[_plain(each.name)]).release
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
