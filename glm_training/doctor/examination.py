"""All checks in their order: first what the others need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from glm_training.doctor import trial
from glm_training.doctor.commands import Asked
from glm_training.doctor.findings import Finding
from glm_training.doctor.installed import absent_extras, installed
from glm_training.doctor.processes import look

if TYPE_CHECKING:
    from glm_training.config import Config

OF_MACHINE = ("GPU", "disk", "downloads", "OCR", "tesseract", "metrics")
OF_CONFIGURATION = ("GPU", "extras", "optimizer", "tesseract", "model", "memory", "places", "disk", "scorers")


def examine(asked: Asked, config: Config | None, *, limit: float, quick: bool = False) -> Iterator[Finding]:
    """Findings as they come. With a configuration, of what it needs alone. limit: seconds of each check. quick: nothing
    is trained. What fails for the libraries' sake is skipped until they are mended."""
    sound = True
    for finding in installed():
        sound = sound and finding.status != "failed"
        yield finding
    if config is None:
        yield from absent_extras()
    gpus = 0
    for finding in look(OF_MACHINE if config is None else OF_CONFIGURATION, asked, limit):
        gpus += finding.status == "ok" and "gib" in finding.facts
        yield _excused(finding, sound)
    if quick:
        return
    yield _excused(trial.step(asked, limit), sound)
    if config is None or gpus > 1 or config.distributed.strategy == "fsdp":
        yield _excused(trial.two(asked, limit, gpus), sound)


def _excused(finding: Finding, sound: bool) -> Finding:
    """A crash, where libraries are missing or of another version, is theirs."""
    if sound or not finding.facts.get("crashed"):
        return finding
    return replace(finding, status="skipped", message="once the libraries above are mended", command=())
