import io
import os
import pty
import re
import subprocess
import sys

import pytest

from glm_training.utils.console import Console

METRICS = {
    "reward/total": 0.51234, "reward/lpips": 0.3, "ar/kl": 0.00123, "ar/clip_fraction": 0.25, "images_per_second": 12.3,
    "time/step_seconds": 1.0,
}  # fmt: skip


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_plain_output_is_one_line_per_report_without_control_characters():
    out = io.StringIO()
    with Console(output=out).progress(7, 2, every=3) as progress:
        for step in range(3, 8):
            progress.update(step, METRICS)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7"]
    assert lines[-1].startswith("step 7/7  ETA 0:00:00  reward 0.5123  ar kl 0.00123")
    assert all(character.isprintable() or character == "\n" for character in out.getvalue())


def test_a_terminal_gets_a_bar():
    out = Terminal()
    with Console(output=out).progress(4) as progress:
        progress.update(3, METRICS)
    assert "\x1b[" in out.getvalue() and "3/4" in out.getvalue() and "reward 0.5123" in out.getvalue()


def test_tables_align():
    out = io.StringIO()
    console = Console(output=out)
    console.table("Scores", ["score", "before"], [["reward", "0.123"], ["a longer one", 1]])
    assert out.getvalue() == (
        "Scores\nscore         before\n------------  ------\nreward         0.123\na longer one       1\n"
    )
    terminal = Terminal()
    Console(output=terminal).table("Scores [x]", ["score"], [["[red]"]])
    assert "[red]" in terminal.getvalue() and "Scores [x]" in terminal.getvalue()


HEADERS = ["figure", "before", "after", "change", "standard error", ""]
ROWS = [
    ["dit rejected_error", "0.17793", "0.17832", "+0.00039", "0.00035", "worse"],
    ["reward", "0.500", "0.250", "-0.250", "-", "better"],
]


@pytest.mark.parametrize("columns", [30, 40, 50, 60, 80, 120, 200])
def test_no_number_of_a_table_is_cut_however_narrow_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    Console(output=terminal).table("Scores", HEADERS, ROWS)
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert all(len(line.rstrip()) <= columns for line in text.splitlines())
    words = text.split()
    for cell in (cell for row in ROWS for cell in row[1:]):
        assert cell in words, cell
    assert "…" not in text and all(word in words for word in ("before", "after", "change", "standard", "error"))
    if columns >= 80:
        assert "dit rejected_error  0.17793  0.17832  +0.00039" in re.sub("  +", "  ", text)
    if columns <= 40:
        assert "dit rejected_error\n  before 0.17793" in text


def test_disabled_says_nothing_but_errors():
    out, errors = io.StringIO(), io.StringIO()
    console = Console(enabled=False, output=out, errors=errors)
    console.line("x")
    console.table("t", ["a"], [["b"]])
    with console.progress(2) as progress:
        progress.update(1, METRICS)
    console.error("no\x1b[2J disk")
    assert out.getvalue() == "" and errors.getvalue() == "error: no[2J disk\n"


def test_a_narrow_encoding_is_no_error():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Console(output=out).line("猫\x07")
    assert raw.getvalue() == b"\\u732b\n"


def test_the_bar_leaves_the_cursor_as_it_was():
    code = (
        "from glm_training.utils.console import Console\n"
        "import sys\n"
        "assert 'rich' not in sys.modules and 'torch' not in sys.modules\n"
        "with Console().progress(1) as progress: progress.update(1, {})"
    )
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path)), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=slave, check=True, env=environment)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l") and "1/1" in shown
