"""Two experts of the random tiny model for on-policy distillation: one of adapters, one trained whole."""

from __future__ import annotations

from pathlib import Path

import torch

from glm_training.engine.families import build_family
from glm_training.utils.distributed import World
from tests.runs import PROMPTS, config_of

NAMED = ["training.method=opd", "opd.teachers.first.adapters=FOLDER/first", "opd.teachers.second.model=FOLDER/second"]
OPD = [
    *NAMED,
    "opd.teachers.first.prompts_file=FOLDER/first.txt",
    "opd.teachers.second.prompts_file=FOLDER/second.txt",
]


OWN = {"first": PROMPTS[:3], "second": PROMPTS[3:]}
"""Whose prompts are whose: unevenly, so that no order of them is its own mirror image."""


def opd(folder: Path, *overrides: str) -> list[str]:
    """The overrides of a run that learns from the experts in `folder`."""
    return [key.replace("FOLDER", str(folder)) for key in (*OPD, *overrides)]


def write_experts(folder: Path) -> None:
    """`first` and `second` with their prompts, as `OWN` says."""
    generator = torch.Generator().manual_seed(0)
    adapted = build_family(config_of(folder, "lora.enabled=true", "lora.rank=2", "lora.alpha=4"), World())
    whole = build_family(config_of(folder), World())
    for half in ("ar", "dit"):
        with torch.no_grad():
            for name, value in adapted.trainable(half).items():
                if ".lora_B." in name:
                    value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            for value in whole.trainable(half).values():
                value.add_(0.2 * value.std().nan_to_num() * torch.randn(value.shape, generator=generator))
        adapted.save_lora(half, folder / "first" / f"lora_{half}")
    whole.save_pretrained(folder / "second")
    for name, prompts in OWN.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
