"""`glm-train`: train, validate, sample."""

from __future__ import annotations

import argparse
import sys

from glm_training import __version__
from glm_training.cli import training


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="glm-train", description="Post-training for GLM-Image.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train as a YAML file says", description="Train as a YAML file says.")
    training.add_arguments(train)
    validate = commands.add_parser(
        "validate",
        help="check a YAML file, its data and its rewards",
        description="Check a YAML file, decode all of its data and load its rewards; the model is not loaded.",
    )
    validate.add_argument("--config", required=True, metavar="FILE", help="YAML file of a run")
    validate.add_argument("--mode", choices=("t2i", "i2i"), help="instead of training.mode")
    validate.add_argument("overrides", nargs="*", metavar="key.path=value", help="any key of the file")
    sample = commands.add_parser("sample", help="draw images", description="Draw images with a model.")
    _sample_arguments(sample)
    arguments = parser.parse_args()
    sys.exit(_run(arguments))


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny, a pipeline folder (of a checkpoint), or a hub id")
    parser.add_argument("--lora", action="append", default=[], metavar="ar|dit=FOLDER", help="PEFT folder of a half")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--source", action="append", default=[], help="image to edit, one per prompt")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--height", type=int, help="pixels (default: the model's own size)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's own size)")
    parser.add_argument("--samples", type=int, default=1, help="images per prompt")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=1.5, help="guidance scale; 1 = off")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        return training.run(arguments)
    if arguments.command == "validate":
        from glm_training.cli.validate import validate

        return validate(arguments.config, arguments.overrides, arguments.mode)
    from glm_training.cli.sample import sample

    return sample(arguments)


if __name__ == "__main__":
    main()
