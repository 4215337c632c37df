"""`glm-train report`: the page of a run, or of several beside each other, with the verdict on the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from glm_training.cli.arguments import place
from glm_training.cli.messages import report_error
from glm_training.cli.training import EXIT_CONFIG

COMPARISON = "comparison.html"

DESCRIPTION = (
    "Make the page of a run, one file that needs no network: curves, monitors, samples, rollouts, settings. Of several "
    "runs, say which is better, by how much and how sure that is, and show them beside each other. A run may still be "
    "going, or have been moved here from elsewhere."
)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the page goes."""
    parser.add_argument("runs", nargs="+", type=place, metavar="RUN", help="folder of a run (its output_dir)")
    parser.add_argument(
        "--out",
        type=place,
        metavar="FILE",
        help="the page; else report.html in the run, of several comparison.html here",
    )


def report(arguments: argparse.Namespace) -> int:
    """0; 2 where a folder holds no run, or the page cannot be written."""
    from glm_training.report.comparison import compare
    from glm_training.report.page import page, write_page
    from glm_training.report.run import PAGE, ReportError, read_runs
    from glm_training.report.terminal import told
    from glm_training.utils.console import Console

    console = Console()
    try:
        runs = read_runs(arguments.runs)
        comparison = compare(runs) if len(runs) > 1 else None
        html = page(runs, comparison)
        told(console, runs, comparison)
        path = Path(arguments.out or (runs[0].folder / PAGE if comparison is None else COMPARISON)).expanduser()
        write_page(path, html)
    except ReportError as error:
        report_error(str(error))
        return EXIT_CONFIG
    console.line(f"page: {path}")
    return 0
