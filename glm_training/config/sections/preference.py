"""Preference tuning: the `dpo` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import FilePath, Section


class DPOConfig(Section):
    """`training.method: dpo`: direct preference optimization on pairs of images (`data.pairs`)."""

    loss: Literal["dpo", "sft"] = Field(
        default="dpo", description="`sft` = supervised finetuning on the preferred images alone."
    )
    beta: float = Field(
        default=5000.0,
        gt=0,
        le=1_000_000,
        description="UNet and DiT: pull towards the reference (Diffusion-DPO's beta).",
    )
    ar_beta: float = Field(
        default=0.1, gt=0, le=1_000_000, description="AR: the same for log-probs of whole sequences."
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="SDXL: errors weighted by min-SNR with this gamma; null = all alike.",
    )
    timesteps: Literal["uniform", "turbo"] = Field(
        default="uniform", description="SDXL: where pairs are noised; `turbo` = at 249, 499, 749 and 999 only."
    )
    prompt_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of pairs trained without their prompt, on what guidance leads away from in sampling.",
    )
    crop: Literal["center", "random"] = Field(
        default="center",
        description="Which part of an image of another shape is used; `random` crops are encoded at every step.",
    )
    vae_batch_size: int | None = Field(
        default=None, ge=1, le=65536, description="Of older files: images are encoded one at a time."
    )
    cache: bool | None = Field(default=None, description="Older name of `cache.enabled`.")
    cache_dir: FilePath | None = Field(default=None, description="Older name of `cache.dir`.")
