"""What a person sees: progress, tables, errors. The only module that writes to the terminal.

On a terminal, rich draws a progress bar; elsewhere (files, pipes, CI) there is one plain line per report, without
control characters. rich is imported when something is drawn, not before.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from glm_training.utils.streams import surviving

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

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
}
REWARD = "reward/total"


class Progress(Protocol):
    """Told of every finished step."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` steps are finished; ``metrics`` are the figures of the last one."""


class Console:
    """Terminal output of one process; silent when not ``enabled``, except for errors.

    Args:
        enabled: false on all processes but the main one.
        output: where text goes, standard output by default. errors: standard error by default.
    """

    def __init__(self, enabled: bool = True, output: TextIO | None = None, errors: TextIO | None = None) -> None:
        self.enabled = enabled
        self._output = output
        self._errors = errors

    @property
    def _out(self) -> TextIO:
        return surviving(self._output or sys.stdout)

    def line(self, text: str = "") -> None:
        """One line of plain text, above a progress bar if there is one."""
        if self.enabled:
            print(_printable(text, self._out), file=self._out, flush=True)

    def error(self, message: str) -> None:
        """An error for the user, on standard error, from any process."""
        stream = surviving(self._errors or sys.stderr)
        prefix = "\x1b[1;31merror:\x1b[0m" if stream.isatty() else "error:"
        print(f"{prefix} {_printable(message, stream)}", file=stream, flush=True)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table: the first column to the left, the others to the right."""
        if not self.enabled:
            return
        texts = [[str(cell) for cell in row] for row in rows]
        if self._out.isatty():
            self._rich_table(title, headers, texts)
            return
        widths = [max(len(row[column]) for row in [list(headers), *texts]) for column in range(len(headers))]
        self.line(title)
        for row in [list(headers), ["-" * width for width in widths], *texts]:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())

    def _rich_table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.table import Table

        self.line(title)
        table = Table()
        for column, header in enumerate(headers):
            table.add_column(escape(header), justify="left" if column == 0 else "right")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        RichConsole(file=self._out).print(table)

    @contextmanager
    def progress(self, total: int, done: int = 0, *, every: int = 1) -> Iterator[Progress]:
        """A progress bar for ``total`` steps, ``done`` of which were finished before; ETA from this session's pace.

        Away from a terminal: a line at every ``every``-th step (``logging.log_interval``) and at the last.
        """
        if not self.enabled:
            yield _Silent()
        elif self._out.isatty():
            with self._rich_progress() as bar:
                yield _Bar(bar, bar.add_task("training", total=total, completed=done, figures=""))
        else:
            yield _Lines(self, total, done, every)

    def _rich_progress(self) -> "RichProgress":
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=RichConsole(file=self._out),
        )


def figures(metrics: Mapping[str, float]) -> str:
    """The metrics a progress line shows: reward, then loss, KL, clip fraction of each part, and images per second."""
    shown = [f"reward {metrics[REWARD]:.4g}"] if REWARD in metrics else []
    for name, value in metrics.items():
        part, _, last = name.rpartition("/")
        if last in SHOWN:
            label = f"{part} {SHOWN[last]}" if part else SHOWN[last]
            shown.append(f"{label} {value:.3g}")
    return "  ".join(shown)


class _Silent:
    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


class _Bar:
    def __init__(self, bar: "RichProgress", task: "TaskID") -> None:
        self._bar = bar
        self._task = task

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step, figures=figures(metrics))


class _Lines:
    def __init__(self, console: Console, total: int, done: int, every: int) -> None:
        self._console = console
        self._total = total
        self._done = done
        self._every = every
        self._started = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % self._every and step != self._total:
            return
        pace = (time.monotonic() - self._started) / max(1, step - self._done)
        parts = [f"step {step}/{self._total}", figures(metrics), f"ETA {_clock(pace * (self._total - step))}"]
        self._console.line("  ".join(part for part in parts if part))


def _printable(text: str, stream: TextIO) -> str:
    """Without control characters (a prompt may hold any), and in what the stream's encoding can say."""
    kept = "".join(character for character in text if character.isprintable() or character in "\n\t")
    encoding = stream.encoding or "utf-8"
    return kept.encode(encoding, "backslashreplace").decode(encoding)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
