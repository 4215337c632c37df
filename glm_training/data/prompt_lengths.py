"""How much of its prompts the model reads: faults of those it cannot take, a remark on those it cuts."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Protocol

from glm_training.data.problems import Problem
from glm_training.utils.words import counted

SHOWN = 3


class PromptReading(Protocol):
    """What a model makes of a prompt. ``fault``: why it cannot take it, and the remedy; ``cut``: what it leaves out, in
    words; ``read``: equal for prompts that are one to the model, None where it reads them whole."""

    @property
    def fault(self) -> tuple[str, str] | None: ...

    @property
    def cut(self) -> str | None: ...

    @property
    def read(self) -> Hashable: ...


PromptReader = Callable[[Sequence[str]], Sequence[PromptReading]]


def check_lengths(
    path: Path, prompts: Sequence[tuple[int, int | None, str]], reader: PromptReader
) -> tuple[list[Problem], list[str]]:
    """Problems and remarks of the prompts of ``path``, each with its index and its line, None in a table."""
    unique = list(dict.fromkeys(prompt for *_, prompt in prompts))
    readings = dict(zip(unique, reader(unique), strict=True))
    problems = []
    cut: dict[str, str] = {}
    same: dict[Hashable, set[str]] = {}
    for index, line, prompt in prompts:
        reading = readings[prompt]
        if reading.fault is not None:
            problems.append(Problem(path, *reading.fault, line=line, index=index))
        elif reading.cut is not None:
            cut.setdefault(prompt, f"{f'row {index}' if line is None else f'{path}:{line}'}: {reading.cut}")
            if reading.read is not None:
                same.setdefault(reading.read, set()).add(prompt)
    if not cut:
        return problems, []
    shown = "; ".join(list(cut.values())[:SHOWN]) + (f"; and {len(cut) - SHOWN} more" if len(cut) > SHOWN else "")
    alike = sum(len(texts) for texts in same.values() if len(texts) > 1)
    remark = (
        f"the model does not read all of {len(cut)} of {counted(len(unique), 'prompt')} in {path}"
        + (f", and {alike} of them differ only in what it does not read" if alike else "")
        + f": {shown}. Put what matters first, or shorten them"
    )
    return problems, [remark]
