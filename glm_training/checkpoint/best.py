"""``best``: the file that names the checkpoint of a run's best evaluation, with its step and score.

Its first line is the checkpoint's name, as in ``latest``; the second is JSON: the step, the figure that decides, its
value, and whether more of it is better.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

BEST = "best"
_NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Best:
    """A checkpoint and how well it did. ``figure``: as the log calls it, like ``eval/total``."""

    name: str
    step: int
    figure: str
    score: float
    higher_is_better: bool

    def beaten_by(self, score: float) -> bool:
        """Whether ``score`` is better; an equal one is not, so that of ties the earlier stays, and NaN never is."""
        return score > self.score if self.higher_is_better else score < self.score

    def told(self) -> str:
        """For a person: the step, the figure and which way it goes."""
        direction = "higher" if self.higher_is_better else "lower"
        return f"step {self.step}, {self.figure} {self.score:.6g} ({direction} is better)"

    def encoded(self) -> bytes:
        """The bytes of the file."""
        record = {key: value for key, value in asdict(self).items() if key != "name"}
        return f"{self.name}\n{json.dumps(record, allow_nan=False)}\n".encode("ascii")


def read_best(checkpoints_dir: Path) -> Best | None:
    """What ``best`` says in a folder of checkpoints; None where there is none that can be read. Whether the checkpoint
    is there, and whose it is, is the caller's to ask."""
    try:
        name, record = (checkpoints_dir / BEST).read_text(encoding="ascii").splitlines()
        said = json.loads(record)
        best = Best(name, int(said["step"]), str(said["figure"]), float(said["score"]), bool(said["higher_is_better"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a folder of the user's is no pointer either
        return None
    return best if _NAME.fullmatch(name) and math.isfinite(best.score) else None
