"""The model that `--model` and `--lora` mean, and how it draws: the same for every command that draws."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm_training.engine.named_model import NamedModel, named_adapters, named_model
from glm_training.evaluation.suites.drawing import fingerprint
from glm_training.models.adapters import StartingAdapter
from glm_training.models.family import Family, Sampling

GUIDANCE = {"glm_image": 1.5, "sdxl": 5.0, "vgt": 4.5}
STEPS = {"glm_image": 50, "sdxl": 50, "vgt": 30}
"""What the stock pipelines and VGT's authors draw with."""

CLASS_NAMES = {"StableDiffusionXL": "sdxl", "VGT": "vgt"}
"""How the class that a model_index.json names begins -> the family; any other is a GLM-Image."""

IN_WORDS_OF_SAMPLE = (
    ("model.local_files_only: true", "HF_HUB_OFFLINE=1"),
    ("model.local_files_only is set", "HF_HUB_OFFLINE=1 is set"),
    ("model.family (--family of sample)", "--family"),
    ("model.name: ", "--model "),
    ("model.name", "--model"),
    ("model.taesd", "the pipeline's TAESD"),
)
"""Keys of a configuration in the messages of loaders -> what this command has in their place."""


@dataclass(frozen=True)
class Choice:
    """What was asked for, found and held against each other, and not loaded yet.

    name: as it was given. kind: the name of its family. adapters: of `--lora`. notes: what is worth telling, a line
    each.
    """

    name: str
    model: NamedModel
    kind: str
    adapters: tuple[StartingAdapter, ...]
    notes: tuple[str, ...]
    dtype: str | None

    def load(self, device: torch.device | None = None) -> Family:
        """On `device`, or the GPU where there is one. Raises ModelLoadError or FileNotFoundError, in words of a
        configuration (`in_words_of_sample`)."""
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype or ("bfloat16" if device.type == "cuda" and self.name != "tiny" else "float32")
        return self.model.load(self.kind, dtype=getattr(torch, dtype), device=device, adapters=self.adapters)

    def described(self, family: Family) -> dict[str, Any]:
        """All of it that decides what is drawn, for files beside the pictures. `family`: what `load` gave."""
        every = [*self.model.adapters, *self.adapters]
        return {
            "model": self.model.source,
            "weights": fingerprint(Path(self.model.source)),
            "family": self.kind,
            "lora": [
                {
                    "part": each.part,
                    "folder": str(each.folder),
                    "strength": each.strength,
                    "weights": fingerprint(each.folder),
                }
                for each in every
            ],
            "dtype": str(next(iter(family.module(family.components[0]).parameters())).dtype).removeprefix("torch."),
        }


def choose_model(arguments: argparse.Namespace) -> Choice:
    """What the options of a command mean. Raises ModelLoadError, with all that is wrong with the adapters."""
    model = named_model(arguments.model)
    kind = arguments.family or model.family or family_of(model.source)
    adapters, notes = named_adapters(arguments.lora, model, kind)
    told = [] if model.note is None else [model.note]
    return Choice(arguments.model, model, kind, tuple(adapters), (*told, *notes), arguments.dtype)


def how_to_draw(arguments: argparse.Namespace, family: Family, kind: str) -> Sampling:
    """Steps and guidance: as asked for, or as the model was distilled, or the stock pipeline's. Raises ValueError for
    an option that the family has no use for."""
    if arguments.parallel is not None and kind != "vgt":
        raise ValueError("--parallel is for VGT: other models draw whole images at once")
    few = family.few_steps
    steps, guidance = (STEPS[kind], GUIDANCE[kind]) if few is None else (few.steps, 1.0)
    return Sampling(
        arguments.temperature,
        arguments.top_p,
        True,
        arguments.steps or steps,
        guidance if arguments.guidance is None else arguments.guidance,
        arguments.parallel or 1,
    )


def family_of(model: str) -> str:
    """The family that a pipeline folder's model_index.json names; GLM-Image for any other model."""
    index = Path(model) / "model_index.json"
    if not index.is_file():
        return "glm_image"
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "glm_image"  # whose loading says what is wrong with the file
    return next((family for start, family in CLASS_NAMES.items() if str(name).startswith(start)), "glm_image")


def in_words_of_sample(message: str) -> str:
    """`message` of a loader, which speaks of a configuration's keys, with this command's options in their place."""
    for key, option in IN_WORDS_OF_SAMPLE:
        message = message.replace(key, option)
    return message
