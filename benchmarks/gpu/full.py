"""GLM-Image of the published sizes with random weights, built where it is to lie: nothing is read or downloaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.tiny import BASE, ROOT, metrics, settings
from glm_training.models.glm_image.full_width import build_published, published, random_network

GRPO = [
    *BASE,
    "model.name=tiny-random",  # what is asked of its files; the weights are those of `build_published`
    "model.torch_dtype=bfloat16",
    "lora.enabled=true",
    "checkpoint.save_lora_only=true",  # a pipeline of 35 GB at the end would take longer than the steps
    "training.optimizer=adamw",
    "training.batch_size=1",
    "training.max_steps=2",
    "training.gradient_checkpointing=true",
    "rollout.plans_per_prompt=4",
    "rollout.micro_batch_size=2",
    "reward.metrics={structure: 1.0}",
    "reward.dit.weights={structure: 1.0}",
]


def random_ar(device: str) -> Any:
    """The AR half alone in bf16: 10.1 billion random weights."""
    return random_network("vision_language_encoder", published, dtype=torch.bfloat16, device=device)


def train(overrides: list[str], device: str, small: bool) -> dict[str, Any]:
    """Seconds by phase, rates and peak memory of the second of two GRPO steps of both halves with LoRA."""
    from glm_training.engine import families
    from glm_training.models.glm_image.family import GLMImage

    def load(name: str, *, dtype: Any, device: Any, cuda_graph: Any = "auto", **unread: Any) -> GLMImage:
        family = GLMImage.from_pipeline(build_published(device=device)).to(device)
        family.ar.stepper.mode = cuda_graph
        return family

    if not small:
        families.FAMILIES["glm_image"] = replace(families.FAMILIES["glm_image"], load=load)
    rows = metrics("configs/quickstart.yaml", [*GRPO, *overrides, *settings(device, "bf16")])
    names = ("time/", "memory/", "ar/loss", "dit/loss", "reward/")
    told = {key: value for key, value in rows[-1].items() if key.startswith(names) or key.endswith("_per_second")}
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {"step": told, "peak_allocated_bytes": peak}


def planned(overrides: list[str]) -> dict[str, Any]:
    """The peak that `glm-train plan` works out for the same settings, or why there is none."""
    try:
        from glm_training.config import load_config
        from glm_training.planning.plan import Card, make_plan  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        return {"bytes": None, "why": str(error)}
    options = [*GRPO, *overrides, "model.name=zai-org/GLM-Image", "training.mixed_precision=bf16"]
    plan = make_plan(load_config(ROOT / "configs/quickstart.yaml", options), card=Card(None, "not asked"))
    return {"bytes": plan.peak.total, "phase": plan.peak.name}
