"""GLM-Image of the published sizes with random weights, built where it is to lie: nothing is read or downloaded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.tiny import BASE, ROOT, metrics, settings

GRPO = [
    *BASE,
    "model.name=tiny-random",  # what is asked of its files; the weights are those of `random_pipeline`
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


def published(part: str) -> dict[str, Any]:
    """The configuration of a network of zai-org/GLM-Image, as it ships with the package."""
    place = ROOT / "glm_training/models/glm_image/published" / f"{part}.json"
    settings = json.loads(place.read_text(encoding="utf-8"))
    settings.pop("source")
    return dict(settings)


def random_ar(device: str) -> Any:
    """The AR half alone in bf16: 10.1 billion random weights."""
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    return _built(
        lambda: GlmImageForConditionalGeneration(GlmImageConfig(**published("vision_language_encoder"))), device
    )


def random_pipeline(device: str) -> Any:
    """All of it in bf16, with the tiny model's tokenizers over the published codebook."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from glm_training.models.glm_image.tiny import RANDOM_SHAPE, build_tiny

    ar = random_ar(device)
    small: Any = build_tiny(replace(RANDOM_SHAPE, codebook=ar.config.vq_config.num_embeddings))
    ar.config.image_token_id = small.vision_language_encoder.config.image_token_id
    ar.generation_config = small.vision_language_encoder.generation_config
    channels = published("vae")["latent_channels"]
    vae = {**published("vae"), "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=small.processor,
        text_encoder=_built(lambda: T5EncoderModel(T5Config(**published("text_encoder"))), device),
        vision_language_encoder=ar,
        vae=_built(lambda: AutoencoderKL.from_config(vae), device),
        transformer=_built(lambda: GlmImageTransformer2DModel.from_config(published("transformer")), device),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(small.scheduler.config),
    )


def _built(make: Any, device: str) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def train(overrides: list[str], device: str, small: bool) -> dict[str, Any]:
    """Seconds by phase, rates and peak memory of the second of two GRPO steps of both halves with LoRA."""
    from glm_training.engine import families
    from glm_training.models.glm_image.family import GLMImage

    def load(name: str, *, dtype: Any, device: Any, cuda_graph: Any = "auto", **unread: Any) -> GLMImage:
        family = GLMImage.from_pipeline(random_pipeline(str(device))).to(device)
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
