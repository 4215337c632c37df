"""`test_installation.py`: is everything here that a run needs, and does the tiny model draw?"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from importlib.metadata import version

from glm_training import __version__
from glm_training.utils.console import Console

LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "peft", "accelerate", "rapidocr", "lpips")
EXTRAS = {name: name for name in ("wandb", "swanlab", "trackio", "bitsandbytes", "pytesseract")}
EXTRAS |= {"evaluation": "torch_fidelity"}


def main() -> None:
    """Prints one line per check; exits with 1 when something needed is missing or the tiny model cannot draw."""
    argparse.ArgumentParser(
        description="Check that everything a run needs is here: library versions, extras, GPUs; then let the tiny "
        "model draw a sign and read it by OCR. Exits with 1 when something is missing."
    ).parse_args()
    from glm_training.utils.requirements import check_requirements

    console = Console()
    console.line(f"glm_training {__version__}, Python {sys.version.split()[0]}")
    try:
        check_requirements()
    except ImportError as error:
        console.error(str(error))
        sys.exit(1)
    console.line("libraries: " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        console.line(f"extra {extra}: " + ("installed" if found else f'absent (pip install -e ".[{extra}]")'))
    if importlib.util.find_spec("pytesseract") and shutil.which("tesseract") is None:
        console.line("the tesseract program is absent (apt-get install tesseract-ocr)")
    _check_devices(console)
    failure = _draw(console)
    if failure is not None:
        console.error(failure)
        sys.exit(1)
    console.line("everything a run needs is here")


def _check_devices(console: Console) -> None:
    import torch

    if not torch.cuda.is_available():
        console.line("GPU: none; the tiny model trains on the CPU, zai-org/GLM-Image needs a GPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        console.line(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _draw(console: Console) -> str | None:
    """Draws a sign with the tiny model and reads it; returns why that failed and what to do, or None."""
    try:
        from glm_training.cli.messages import hide_progress_bars
        from glm_training.models.glm_image.family import GLMImage
        from glm_training.rewards import read_texts

        hide_progress_bars()
        images = GLMImage.load("tiny").generate(
            ['a blue sign that says "STOP"'], height=128, width=128, seed=0, num_inference_steps=8, guidance_scale=1.0
        )
        console.line(f"the tiny model drew a sign; OCR reads {read_texts(images)[0]}")
    except Exception as error:  # whatever a broken library raises: finding it is what this check is for
        return (
            f"the tiny model cannot draw here: {type(error).__name__}: {error}\n"
            "What to do, if that does not say it: reinstall the package with its libraries, "
            "pip install --force-reinstall -e ."
        )
    return None
