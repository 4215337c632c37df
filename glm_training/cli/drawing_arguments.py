"""Options that say which model draws and how: the same for every command that draws."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from glm_training.cli.arguments import number, place, whole_number


def add_drawing_arguments(parser: argparse._ActionsContainer) -> None:
    """The model, its adapters, and the numbers of the sampling."""

    def add(name: str, kind: Callable[[str], Any], default: Any, metavar: str, meaning: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{meaning} (%(default)s)")

    models = "tiny, a run (its best checkpoint, or else its last), a checkpoint, a pipeline folder, or a hub id"
    add("--model", place, "tiny", "MODEL", models)
    parser.add_argument(
        "--family",
        choices=("glm_image", "sdxl", "vgt"),
        help="what kind of model it is (what its folder says, or glm_image)",
    )
    parser.add_argument(
        "--lora",
        type=place,
        action="append",
        default=[],
        metavar="PLACE[:STRENGTH]",
        help="adapters to merge, a strength beside each (1): an adapter's folder, a checkpoint or a run; of one part "
        "alone with ar=, dit= or unet= before it; give it again for more",
    )
    for side in ("--height", "--width"):
        pixels = whole_number(8, 8192)
        multiple = "a multiple of 32; vgt: of its latents (the model's own size)"
        parser.add_argument(side, type=pixels, metavar="PIXELS", help=multiple)
    steps = "denoising steps; vgt: of each latent (50, or what a model was distilled to; vgt: 30)"
    parser.add_argument("--steps", type=whole_number(1, 1000), metavar="N", help=steps)
    guidance = "1 = off (1.5; sdxl: 5; vgt: 4.5; distilled: 1)"
    parser.add_argument("--guidance", type=number(1, 1000), metavar="SCALE", help=guidance)
    parallel = "vgt: latents written at once; more is faster and less exact (1)"
    parser.add_argument("--parallel", type=whole_number(1, 4096), metavar="N", help=parallel)
    add("--temperature", number(0.01, 100), 0.9, "T", "of the AR half's sampling")
    add("--top-p", number(1e-6, 1), 0.75, "P", "nucleus of the AR half's sampling")
    add("--seed", whole_number(0, 2**63 - 1), 0, "N", "same seed, same images")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (bfloat16 on a GPU, else float32)")
