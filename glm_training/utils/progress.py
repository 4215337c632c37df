"""How far a run is: on a terminal a bar with its figures, elsewhere a line now and then.

Whatever the width, step, bar, time left and reward come first. The other figures follow where they all fit, else they
stand below the bar in columns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from glm_training.utils.words import number

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderableType
    from rich.live import Live

# Last part of a metric's name -> how a progress line calls it. The rest is in metrics.jsonl.
SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "dmd_loss": "DMD loss",
    "fake_loss": "fake loss",
    "reward_loss": "reward loss",
    "kl": "kl",
    "clip_fraction": "clip",
    "images_per_second": "images/s",
    "tokens_per_second": "tokens/s",
}
REWARD = "reward/total"
SECONDS = "time/step_seconds"
WIDEST_BAR, NARROWEST_BAR = 24, 4
GAP = "  "


class Progress(Protocol):
    """Told of every finished step."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` steps are finished; ``metrics`` are the figures since the last logged line."""


def shown_figures(metrics: Mapping[str, float]) -> list[str]:
    """What a person watches: the reward, then loss, KL, clip fraction of each part, and the rates."""
    shown = [f"reward {number(metrics[REWARD], '.4g')}"] if REWARD in metrics else []
    for name, value in metrics.items():
        part, _, last = name.rpartition("/")
        if last in SHOWN:
            label = f"{part} {SHOWN[last]}" if part else SHOWN[last]
            shown.append(f"{label} {number(value, '.3g' if abs(value) < 1000 else ',.0f')}")
    return shown


def figures(metrics: Mapping[str, float]) -> str:
    """`shown_figures` in a line."""
    return GAP.join(shown_figures(metrics))


def wrapped(parts: Sequence[str], width: int) -> list[str]:
    """All of `parts` in lines of at most `width` columns, but for a part that is wider."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(GAP) + len(part) <= width:
            lines[-1] += GAP + part
        else:
            lines.append(part)
    return lines


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of `parts`, from the first on, as a line of `width` columns holds; the first always."""
    return wrapped(parts, width)[0]


def in_columns(parts: Sequence[str], width: int, height: int) -> list[str]:
    """`parts` row by row in as many columns of one width as fit, in at most `height` rows; a row is cut at `width`."""
    if not parts:
        return []
    cell = max(map(len, parts)) + len(GAP)
    columns = max(1, (width + len(GAP)) // cell)
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    return ["".join(part.ljust(cell) for part in row).rstrip()[:width] for row in rows[:height]]


class Pace:
    """The time left, from the steps of this session; the first one, which has the most around it, only till there is
    another, and without what came before it where its own seconds are known."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._from = (done, time.monotonic())
        self._first = True
        self._left = 0.0
        self._told = self._from[1]

    def update(self, step: int, seconds: float | None = None) -> None:
        """`step` steps are finished, the last in so many `seconds`."""
        self._told = time.monotonic()
        since, started = self._from
        mean = (self._told - started) / max(1, step - since)
        self._left = (seconds if self._first and seconds is not None else mean) * (self._total - step)
        if self._first:
            self._first, self._from = False, (step, self._told)

    def __str__(self) -> str:
        return f"ETA {clock(max(0.0, self._left - (time.monotonic() - self._told)))}"


class Silent:
    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


class Lines:
    """A line at every `every`-th step and at the last, whole, or as wide as COLUMNS says where that is set."""

    def __init__(self, line: Callable[[str], None], total: int, done: int, every: int) -> None:
        self._line = line
        self._total = total
        self._every = every
        self._pace = Pace(total, done)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.update(step, metrics.get(SECONDS))
        if step % self._every and step != self._total:
            return
        parts = [f"step {step}/{self._total}", str(self._pace), *shown_figures(metrics)]
        width = os.environ.get("COLUMNS", "")
        self._line(fitting(parts, int(width)) if width.isdecimal() and int(width) else GAP.join(parts))


class Bar:
    """The bar and what stands below it, drawn anew at the width that the terminal has by then."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._step = done
        self._figures: list[str] = []
        self._pace = Pace(total, done)
        self._started = False
        self.live: Live | None = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._started = step, True
        self._figures = shown_figures(metrics)
        self._pace.update(step, metrics.get(SECONDS))
        if self.live is not None:
            self.live.refresh()

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width - 1  # a full last column makes some terminals begin a new line
        step = f"step {self._step}/{self._total}"
        tail = [str(self._pace)] if self._started else []
        rest = list(self._figures)
        if self._room(step, tail, width) < 0:
            tail, rest = [], [*tail, *rest]
        elif self._room(step, [*tail, *rest], width) >= NARROWEST_BAR:
            tail, rest = [*tail, *rest], []
        elif rest and rest[0].startswith("reward ") and self._room(step, [*tail, rest[0]], width) >= NARROWEST_BAR:
            tail.append(rest.pop(0))
        size = min(WIDEST_BAR, self._room(step, tail, width))
        row: list[RenderableType] = [Text(step, no_wrap=True)]
        if size >= NARROWEST_BAR:
            row.append(ProgressBar(total=max(1, self._total), completed=self._step, width=size))
        if tail:
            row.append(Text(GAP.join(tail), no_wrap=True))
        grid = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        grid.add_row(*row)
        yield grid
        for line in in_columns(rest, width, max(1, console.size.height - 3)):
            yield Text(line, no_wrap=True, overflow="crop")

    @staticmethod
    def _room(step: str, tail: Sequence[str], width: int) -> int:
        """Columns that are left for a bar between `step` and `tail`; below 0 where not even those fit."""
        return width - len(step) - 1 - len(GAP.join(tail)) - 1


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
