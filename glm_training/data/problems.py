"""What is wrong with a dataset: one :class:`Problem` per fault, all of them in one :class:`DataError`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_training.utils.words import counted
from glm_training.utils.writable import nearest_place

SHOWN_PROBLEMS = 50


@dataclass(frozen=True)
class Problem:
    """One fault, where it is and what to do about it.

    Attributes:
        path: the file or folder at fault: the prompts file for a fault of one of its lines, else an image or a folder.
        reason: what is wrong.
        remedy: what the user can do.
        line: one-based line of ``path``, as editors count.
        index: zero-based prompt the fault belongs to; None when it belongs to the dataset as a whole, which no
            quarantine can cure.
        image: the image at fault, when ``path`` is the prompts file whose line uses it.
    """

    path: Path
    reason: str
    remedy: str
    line: int | None = None
    index: int | None = None
    image: Path | None = None

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line is not None else str(self.path)
        image = f"{self.image}: " if self.image is not None else ""
        return f"{place}: {image}{self.reason}. {self.remedy}."


class DataError(Exception):
    """The data cannot be trained on. ``problems`` holds every fault; the message shows the first 50."""

    def __init__(self, problems: Sequence[Problem], heading: str | None = None) -> None:
        self.problems: list[Problem] = list(problems)
        super().__init__(format_problems(self.problems, heading))


def correct_path(path: str | Path) -> str:
    """The remedy for a path at which nothing is, with what is called alike there."""
    near = nearest_place(path)
    there = "" if near is None else f", and {near} is there"
    return f"Correct the path; the current directory is {Path.cwd()}{there}"


def format_problems(problems: Sequence[Problem], heading: str | None = None, shown: int = SHOWN_PROBLEMS) -> str:
    """One problem per line under ``heading``; past ``shown`` of them only a count."""
    if heading is None and len(problems) == 1:
        return str(problems[0])
    lines = [heading if heading is not None else f"{counted(len(problems), 'problem')} in the data:"]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  and {len(problems) - shown} more")
    return "\n".join(lines)
