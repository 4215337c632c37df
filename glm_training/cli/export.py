"""`glm-train export`: a checkpoint as files for other programs."""

from __future__ import annotations

import argparse

from glm_training.cli.arguments import place, text
from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED

DESCRIPTION = (
    "Write a checkpoint as files for other programs, with a model card, and verify them in another process before they "
    "have their name. In brackets: what is taken without the option."
)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """What is exported, in which form, and where to."""
    meaning = "a checkpoint, or a run: its best one, where it has marked one, or its newest"
    parser.add_argument("checkpoint", type=place, metavar="CHECKPOINT", help=meaning)
    parser.add_argument(
        "--format",
        choices=("pipeline", "lora", "safetensors"),
        required=True,
        help="a pipeline for diffusers; adapters for PEFT, diffusers and kohya's readers; the trained parts alone",
    )
    parser.add_argument("--out", type=place, required=True, metavar="FOLDER", help="a folder that is not there yet")
    parser.add_argument("--merge", action="store_true", help="add the adapters to the weights")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the slow average of the weights, or those under training (as training.ema.export says)",
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (that of each in the checkpoint)")
    parser.add_argument("--base", type=place, metavar="MODEL", help="the model that adapters belong on (model.name)")
    parser.add_argument("--overwrite", action="store_true", help="rename a folder that is there to NAME.old-1")
    parser.add_argument(
        "--draw",
        action=argparse.BooleanOptionalAction,
        help="draw with what was written, on the CPU in fp32, and compare (models of up to 2 GiB)",
    )
    licence = "for the card, as mit or openrail++ (that of the base model, where its card is here)"
    parser.add_argument("--license", type=text, metavar="ID", help=licence)
    parser.add_argument("--push", type=text, metavar="REPO", help="upload it to the hub, as owner/name")
    parser.add_argument("--public", action="store_true", help="a repository that is made is for everyone")


def export(arguments: argparse.Namespace) -> int:
    """0 once all is written and verified; 2 for what cannot be exported so, 1 for an export that did not come out."""
    hide_progress_bars()
    import torch

    from glm_training.export.formats import Wanted
    from glm_training.export.run import Target, check
    from glm_training.export.run import export as run_export
    from glm_training.export.source import ExportError, Source
    from glm_training.models.loading import ModelLoadError
    from glm_training.utils.console import Console
    from glm_training.utils.writable import expanded

    if arguments.public and arguments.push is None:
        report_error("--public says for whom --push makes a repository: give it too")
        return EXIT_CONFIG
    try:
        source = Source.read(arguments.checkpoint, arguments.base)
        kind = source.chosen(arguments.ema)
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        wanted = Wanted(source, arguments.format, kind, arguments.merge, dtype)
        target = Target(
            expanded(arguments.out),
            arguments.overwrite,
            arguments.draw,
            arguments.license,
            arguments.push,
            arguments.public,
        )
        check(wanted, target)
    except (ExportError, ModelLoadError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    console = Console()
    console.line(source.note or f"exporting {source.folder}")
    try:
        run_export(wanted, target, lambda line: console.line(f"  {line}"))
    except (ExportError, ModelLoadError) as error:
        report_error(str(error))
        return EXIT_FAILED
    console.line(f"{arguments.format} of step {source.manifest.step}: {target.folder}")
    return 0
