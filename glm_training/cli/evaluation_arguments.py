"""Options of `glm-train evaluate`."""

from __future__ import annotations

import argparse

from glm_training.cli.arguments import place, text, whole_number
from glm_training.cli.drawing_arguments import add_drawing_arguments

SUITES = ("geneval", "dpg", "text", "reconstruction")
SAMPLES = {"geneval": 4, "dpg": 4, "text": 1, "reconstruction": 1}
"""Pictures per prompt that a benchmark asks for."""

STAGES = ("generate", "judge", "score")

DESCRIPTION = """\
Run a benchmark in three stages with files between them: generate draws its
pictures in the layout that the benchmark prescribes, judge records what a
detector or a model says of each, score makes figures of the records. What is
whole on disk is not done again. In brackets: what is taken without the option.
"""


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them; those of one suite stand in a group of their own."""
    parser.add_argument("--suite", choices=SUITES, required=True, help="which benchmark")
    parser.add_argument("--stage", choices=STAGES, help="only this one (all of them)")
    parser.add_argument(
        "--prompts", type=place, metavar="PATH", help="the benchmark's prompts, as its authors give them"
    )
    parser.add_argument("--out", type=place, required=True, metavar="FOLDER", help="pictures, records and figures")
    parser.add_argument(
        "--images",
        type=place,
        metavar="FOLDER",
        help="draw none, and judge these pictures, in the benchmark's layout "
        "or those that the command sample has drawn into its folder (samples.jsonl)",
    )
    parser.add_argument(
        "--samples", type=whole_number(1, 10_000), metavar="N", help="pictures per prompt (geneval and dpg: 4, text: 1)"
    )
    parser.add_argument(
        "--at-once", type=whole_number(1, 4096), default=8, metavar="N", help="pictures drawn together (%(default)s)"
    )
    parser.add_argument(
        "--token-variable",
        type=text,
        metavar="NAME",
        help="environment variable with the token of a service that judges",
    )
    add_drawing_arguments(parser.add_argument_group("who draws, and how"))
    geneval = parser.add_argument_group("--suite geneval")
    geneval.add_argument(
        "--detector",
        type=text,
        metavar="SPEC",
        help="transformers:MODEL (a folder or a hub id of a Mask2Former, DETR, ...), the address of a service, or "
        "shapes (for the tiny model)",
    )
    geneval.add_argument(
        "--colors",
        type=text,
        metavar="SPEC",
        help="what tells the colour of an object: a CLIP model or shapes (openai/clip-vit-large-patch14; shapes with "
        "--detector shapes)",
    )
    dpg = parser.add_argument_group("--suite dpg")
    dpg.add_argument("--questions", type=place, metavar="CSV", help="the benchmark's questions")
    dpg.add_argument(
        "--judge",
        type=text,
        metavar="SPEC",
        help="what answers them: transformers:MODEL (ViLT, BLIP), openai:MODEL@ADDRESS, the address of a service, or "
        "shapes (for the tiny model)",
    )
    _add_text(parser)
    _add_reconstruction(parser)


def _add_text(parser: argparse.ArgumentParser) -> None:
    reading = parser.add_argument_group("--suite text")
    reading.add_argument(
        "--reader",
        type=text,
        default="rapidocr",
        metavar="SPEC",
        help="what reads: rapidocr, pytesseract, openai:MODEL@ADDRESS (a vision-language model behind an "
        "OpenAI-compatible endpoint), or the address of a service (%(default)s)",
    )
    reading.add_argument(
        "--clip", type=text, metavar="MODEL", help="CLIP of CVTG-2K's CLIPScore, a folder or a hub id (none)"
    )


def _add_reconstruction(parser: argparse.ArgumentParser) -> None:
    pixels = whole_number(16, 8192)
    group = parser.add_argument_group("--suite reconstruction")
    group.add_argument(
        "--originals",
        type=place,
        metavar="PATH",
        help="pictures that go through the autoencoder of --model: a folder, webdataset tars or a listing",
    )
    group.add_argument("--first", type=whole_number(1, 1_000_000_000), metavar="N", help="so many of them (all)")
    group.add_argument(
        "--size", type=pixels, default=448, metavar="PIXELS", help="side that they are squashed to (%(default)s)"
    )
    group.add_argument(
        "--compare-at", type=pixels, default=256, metavar="PIXELS", help="side at which they are compared (%(default)s)"
    )
    group.add_argument(
        "--inception", type=place, metavar="FILE", help="torch-fidelity's weights for rFID (torch's cache)"
    )
    group.add_argument("--alexnet", type=place, metavar="FILE", help="torchvision's weights for LPIPS (torch's cache)")
    group.add_argument("--no-rfid", action="store_true", help="leave rFID out")
    group.add_argument("--no-lpips", action="store_true", help="leave LPIPS out")
