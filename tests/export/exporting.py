"""Exports for tests: what runs draw, and what an export tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glm_training.export.formats import Format, Wanted
from glm_training.export.run import Target, export
from glm_training.export.source import Source

DRAWN = ["logging.log_images=true", "logging.num_log_images=2", "logging.sample_interval=1"]
"""Every run draws samples at the step of its checkpoint, and none is scored."""


def exported(
    run: Path,
    out: Path,
    form: Format,
    *,
    ema: bool | None = None,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    **target: Any,
) -> list[str]:
    """The lines that an export of the run tells."""
    source, lines = Source.read(run, base), list[str]()
    export(Wanted(source, form, source.chosen(ema), merge, dtype), Target(out, **target), lines.append)
    return lines


def told(lines: list[str], *parts: str) -> None:
    """Every part stands in some line."""
    for part in parts:
        assert any(part in line for line in lines), (part, lines)
