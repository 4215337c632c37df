"""What a benchmark is to `stages`, which draws its pictures, has them judged and scores the records.

    generate   pictures()        -> files of the layout below the folder of pictures, drawn by whoever draws; prepare()
                                    writes what lies beside them
    judge      judge(pictures)   -> one JSON record per picture, appended to `records.jsonl`
    score      score(records)    -> figures; nothing but records goes in

A suite is a small object that holds its prompts and its judge:

    class Brightness:
        name = "brightness"
        judged_by = "mean of the pixels"                # stands beside every figure
        judge_settings = {}                             # what else decides the records: thresholds, names of models

        def pictures(self) -> list[Picture]:            # all there are to be, in a fixed order, `path` unique
            return [Picture(f"{i}.png", prompt, i) for i, prompt in enumerate(self.prompts)]

        def prepare(self, folder: Path) -> None: ...    # files of the layout beside the pictures; may be called again
        def find(self, folder: Path) -> list[Picture]: ...     # the pictures of a folder of the user's, for --images
        def check_judge(self) -> None: ...              # raise EvaluationError before anything is drawn; loads little

        def judge(self, pictures: list[tuple[Picture, Image.Image]]) -> list[Record | Failure]:
            return [{"mean": float(np.mean(image))} for _, image in pictures]

        def score(self, records: list[Record]) -> Scores:
            return Scores([mean_of("brightness", {r["picture"]: [r["mean"]] for r in records})])

`stages` opens the pictures (one that cannot be read is a Failure), adds "picture" (its path) and "file" (a digest: a
picture that was changed is judged anew) to each record, keeps Failures as records with "failure", which `score` never
sees, and counts them beside the figures. A record holds all that `score` needs, prompts included, as JSON. `judge` gets
at most `JUDGED_AT_ONCE` pictures and may be called in any order, in any number of processes; the same picture must give
the same record. Who draws is a `Maker`, not the suite's matter: `drawing.drawer` for a model, or a function of the
suite's own (a reconstruction). `cli/evaluate.py` makes suites of arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

Record = dict[str, Any]
"""What a judge says of one picture, as JSON can."""


class EvaluationError(Exception):
    """An evaluation cannot go on; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Picture:
    """One file of a benchmark's layout.

    path: below the folder of pictures, with slashes; its name in records. prompt: what it shows. index: the prompt's
    place in its list. samples: which samples of the prompt it shows, row by row in a square grid.
    """

    path: str
    prompt: str
    index: int
    samples: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Failure:
    """A judge has nothing to say of a picture, and why: neither right nor wrong."""

    reason: str


Maker = Callable[[Sequence[Picture]], list[Image.Image]]
"""Draws the files of some pictures, each the same whatever its neighbours in other calls."""


@dataclass(frozen=True)
class Figure:
    """A named number. error: its standard error, None where there is none. count: over how many `of` it is. scale: what
    it is multiplied by where it is shown (100 for percent)."""

    name: str
    value: float | None
    error: float | None = None
    count: int = 0
    of: str = "pictures"
    scale: float = 1.0


@dataclass
class Scores:
    """figures: in the order in which they are shown. lines: what goes into `results.jsonl`, one object per picture.
    remarks: what a reader of the figures must know."""

    figures: list[Figure]
    lines: list[Record] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class Suite(Protocol):
    """See the head of this file."""

    @property
    def name(self) -> str: ...

    @property
    def judged_by(self) -> str: ...

    @property
    def judge_settings(self) -> Mapping[str, Any]: ...

    def pictures(self) -> list[Picture]: ...

    def prepare(self, folder: Path) -> None: ...

    def find(self, folder: Path) -> list[Picture]: ...

    def check_judge(self) -> None: ...

    def judge(self, pictures: list[tuple[Picture, Image.Image]]) -> list[Record | Failure]: ...

    def score(self, records: list[Record]) -> Scores: ...


def mean_of(name: str, groups: Mapping[Any, Sequence[float]], *, of: str = "pictures", scale: float = 1.0) -> Figure:
    """The mean over all values of `groups` (prompt -> values of its pictures), with a standard error that knows that
    the pictures of a prompt are alike.

    With G groups of n_g values and mean m_g: sqrt(G / (G - 1) * sum_g (n_g (m_g - mean))^2) / N, the cluster-robust
    error of a mean; for groups of one it is s / sqrt(N). None for fewer than two groups.
    """
    values = [value for group in groups.values() for value in group]
    if not values:
        return Figure(name, None, None, 0, of, scale)
    mean = math.fsum(values) / len(values)
    sums = [math.fsum(value - mean for value in group) for group in groups.values() if group]
    error = None
    if len(sums) > 1:
        error = math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(total**2 for total in sums)) / len(values)
    return Figure(name, mean, error, len(values), of, scale)
