"""What a person sees: progress, tables, errors. The only module that writes to the terminal.

On a terminal, rich draws a progress bar; elsewhere (files, pipes, CI) there is one plain line per report, without
control characters. rich is imported when something is drawn, not before.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from glm_training.utils.progress import GAP, Bar, Lines, Progress, Silent, wrapped
from glm_training.utils.redaction import redact
from glm_training.utils.streams import surviving

if TYPE_CHECKING:
    from rich.live import Live


NAME_WIDTH = 8
"""Columns that the names of a table are folded to at least."""


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
        texts = [[redact(str(cell)) for cell in row] for row in rows]
        if self._out.isatty():
            self._rich_table(title, headers, texts)
            return
        widths = [max(len(row[column]) for row in [list(headers), *texts]) for column in range(len(headers))]
        self.line(title)
        for row in [list(headers), ["-" * width for width in widths], *texts]:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())

    def _rich_table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """As wide as the terminal, no number cut: names are folded, and where that is not enough the columns of a row
        stand below its name."""
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.table import Table

        console = RichConsole(file=self._out)
        self.line(title)
        words = [max(map(len, header.split()), default=0) for header in headers]
        widths = [max([word, *(len(row[i]) for row in rows)]) for i, word in enumerate(words)]
        if sum(widths[1:]) + len(GAP) * (len(headers) - 1) + NAME_WIDTH > console.width:
            for row in rows:
                self.line(row[0])
                cells = [f"{header} {cell}".strip() for header, cell in zip(headers[1:], row[1:], strict=True) if cell]
                for line in wrapped(cells, console.width - len(GAP)):
                    self.line(f"{GAP}{line}")
            return
        whole = [max([len(header), *(len(row[i]) for row in rows)]) for i, header in enumerate(headers)]
        narrow = sum(whole) + len(GAP) * (len(headers) - 1) > console.width  # then headings are folded first
        table = Table(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="bold")
        for column, header in enumerate(headers):
            first = column == 0
            table.add_column(escape(header), justify="left" if first else "right", overflow="fold")
            if not first:
                table.columns[column].width = widths[column] if narrow else whole[column]
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)

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
    """Without control characters (a prompt may hold any) and secrets, and in what the stream's encoding can say."""
    kept = redact("".join(character for character in text if character.isprintable() or character in "\n\t"))
    encoding = stream.encoding or "utf-8"
    return kept.encode(encoding, "backslashreplace").decode(encoding)
