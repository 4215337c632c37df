"""What a person sees: progress, tables, errors. The only module that writes to the terminal.

On a terminal, rich draws a progress bar; elsewhere (files, pipes, CI) there is one plain line per report, without
control characters. rich is imported when something is drawn, not before.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from glm_training.utils.progress import Bar, Lines, Progress, Silent
from glm_training.utils.streams import surviving

if TYPE_CHECKING:
    from rich.live import Live


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
            yield Silent()
        elif self._out.isatty():
            bar = Bar(total, done)
            with self._live(bar) as bar.live:
                yield bar
        else:
            yield Lines(self.line, total, done, every)

    def _live(self, bar: Bar) -> "Live":
        from rich.console import Console as RichConsole
        from rich.live import Live

        return Live(bar, console=RichConsole(file=self._out), refresh_per_second=4)


def _printable(text: str, stream: TextIO) -> str:
    """Without control characters (a prompt may hold any), and in what the stream's encoding can say."""
    kept = "".join(character for character in text if character.isprintable() or character in "\n\t")
    encoding = stream.encoding or "utf-8"
    return kept.encode(encoding, "backslashreplace").decode(encoding)
