"""The process in which checks run: python -m glm_training.doctor.worker, asked on standard input, one JSON object.

Libraries print what they like to standard output; here that goes to standard error, and answers alone to the former.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from glm_training.doctor.commands import Asked, reinstall
from glm_training.doctor.findings import Finding, failed

if TYPE_CHECKING:
    from glm_training.config import Config

CHECKS = {
    "GPU": "devices:devices",
    "OCR": "scorers:reading",
    "tesseract": "scorers:tesseract",
    "metrics": "scorers:at_hand",
    "scorers": "scorers:scorers",
    "extras": "wanted:extras",
    "optimizer": "wanted:optimizers",
    "model": "weights:model",
    "downloads": "weights:broken_off",
    "memory": "memory:memory",
    "disk": "disk:machine",
    "places": "disk:run",
}
"""By name: module and function of this package, which takes what is asked and gives findings. Those that load what
others lack come late."""

Check = Callable[[Asked], Iterable[Finding]]


@cache
def configuration(asked: Asked) -> Config:
    """That which is asked about."""
    from glm_training.config import load_config

    return load_config(asked.paths, asked.overrides, mode=asked.mode)


def main() -> None:
    """Answers what it is asked, each check by itself: one that raises does not end the others."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    given = request["asked"]
    asked = Asked(tuple(given["paths"]), tuple(given["overrides"]), given["mode"])

    def tell(**message: object) -> None:
        print(json.dumps(message), file=answers, flush=True)

    for name in request["checks"]:
        try:
            for finding in _check(name)(asked):
                tell(finding=asdict(finding))
        except Exception as error:  # whatever a broken library raises: finding it is what this is for
            tell(finding=asdict(failed(name, in_a_line(error), reinstall(), crashed=True)))
        tell(end=name)


def in_a_line(error: BaseException) -> str:
    """What was raised first: libraries wrap what they fail to import in errors that name no cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _check(name: str) -> Check:
    module, _, function = CHECKS[name].partition(":")
    check: Check = getattr(import_module(f"glm_training.doctor.{module}"), function)
    return check


if __name__ == "__main__":
    main()
