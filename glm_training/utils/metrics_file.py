"""``metrics.jsonl``: one JSON object per line, ``{"step": 10, "reward/total": 0.52, ...}``, always there."""

import math
from collections.abc import Mapping
from pathlib import Path

from glm_training.utils.failures import beside_training
from glm_training.utils.step_lines import StepLines, keep_until

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""File of a run with a line per evaluation."""
SESSIONS = "sessions.jsonl"
"""File of a run with a line for each time that it was started or resumed."""
TRAINED = "time/step_seconds"
"""A figure that every line of training steps has, and no other line."""
RESERVED = ("step", "nonfinite")


class MetricsFile:
    """Appends lines to ``metrics.jsonl`` of a run directory.

    Args:
        run_dir: the run directory, which exists.
        resume_step: the step the run continues from; None for one that starts. Lines of later steps, which will be
            trained again (all lines, for a run that starts), go to ``metrics.discarded.jsonl``.
        within_interval: the line of training figures of that step goes there too.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, within_interval: bool = False) -> None:
        path = run_dir / METRICS
        keep_until(path, -1 if resume_step is None else resume_step, but_with=TRAINED if within_interval else None)
        self._lines = StepLines(path)
        with beside_training(f"writing {METRICS}"):
            path.touch()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line. NaN and infinities, which JSON lacks, become null and are listed under ``nonfinite``."""
        for name in RESERVED:
            if name in scalars:
                raise ValueError(f"{name!r} is a field of every line of {METRICS} and cannot name a metric")
        values = {name: float(value) for name, value in scalars.items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        line: dict[str, object] = {"step": step, **values, **dict.fromkeys(nonfinite)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._lines.append(line)

    def close(self) -> int:
        """Tries once more to write what the disk has not taken so far; how many lines are lost."""
        return self._lines.write_waiting()
