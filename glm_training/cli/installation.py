"""`test_installation.py`: is everything here that a run needs, and does the tiny model draw?"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from importlib.metadata import version

from glm_training import __version__
from glm_training.utils.console import Console

LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "peft", "accelerate", "rapidocr", "lpips")
EXTRAS = {"wandb": "wandb", "bitsandbytes": "bitsandbytes", "pytesseract": "pytesseract"}


def main() -> None:
    """Prints one line per check; exits with 1 when something needed is missing."""
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
    _draw(console)
    console.line("everything a run needs is here")


def _check_devices(console: Console) -> None:
    import torch

    if not torch.cuda.is_available():
        console.line("GPU: none; the tiny model trains on the CPU, zai-org/GLM-Image needs a GPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        console.line(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _draw(console: Console) -> None:
    from glm_training.models.glm_image.family import GLMImage
    from glm_training.rewards import read_texts

    family = GLMImage.load("tiny")
    images = family.generate(
        ['a blue sign that says "STOP"'], height=128, width=128, seed=0, num_inference_steps=8, guidance_scale=1.0
    )
    console.line(f"the tiny model drew {tuple(images.shape[-2:])}; OCR reads {read_texts(images)[0]}")
