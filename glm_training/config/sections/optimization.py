"""How what is trained moves: adapters, optimizers, and the slow average of the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import PlaceName, Section

AR_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DIT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "lion", "muon", "adamw_schedule_free", "sgd"]
MomentsDtype = Literal["float32", "bfloat16"]
SchedulerName = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class EMAConfig(Section):
    """A slow average of the trained weights, in fp32. Samples, scores and pipelines show it, unless told otherwise."""

    decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the average that each step keeps, as 0.9998; null = none is kept.",
    )
    start_step: int = Field(
        default=0, ge=0, le=1_000_000_000, description="Training steps after which it sets out from the weights."
    )
    evaluate: bool = Field(
        default=True, description="Samples and scores are of the average; false = of the weights under training."
    )
    export: bool = Field(
        default=True,
        description="Pipelines and adapters are written with the average; false = with the weights under training.",
    )


class LoraPartConfig(Section):
    """LoRA of one half; null = what the `lora` section says."""

    enabled: bool | None = Field(default=None, description="Whether this half trains adapters; null = `lora.enabled`.")
    rank: int | None = Field(default=None, ge=1, le=8192, description="Null = `lora.rank`.")
    alpha: float | None = Field(default=None, ge=1e-6, le=1_000_000, description="Null = `lora.alpha`.")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="Null = `lora.dropout`.")


class LoraConfig(Section):
    """Train low-rank adapters in place of the full weights."""

    enabled: bool = Field(default=False, description="Adapters for every trained half; false = full finetuning.")
    rank: int = Field(default=32, ge=1, le=8192, description="Rank of the update.")
    alpha: float = Field(default=64.0, ge=1e-6, le=1_000_000, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout at the adapters' input.")
    start_from: PlaceName | None = Field(
        default=None,
        min_length=1,
        description="Adapters of an earlier run to train on, a folder, checkpoint or run, of which it is the newest; "
        "null = fresh ones.",
    )
    ar_targets: list[str] = Field(
        default=AR_TARGETS, min_length=1, description="Modules of the AR half, by name ending."
    )
    dit_targets: list[str] = Field(
        default=DIT_TARGETS, min_length=1, description="Modules of the DiT half, by name ending."
    )
    unet_targets: list[str] = Field(default=UNET_TARGETS, min_length=1, description="Modules of the UNet, likewise.")
    ar: LoraPartConfig = LoraPartConfig()
    dit: LoraPartConfig = LoraPartConfig()
    unet: LoraPartConfig = LoraPartConfig()


class OptimizerPartConfig(Section):
    """Optimizer of one half; null = the value of the `training` section."""

    learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Null = the one of this half in `training`."
    )
    name: OptimizerName | None = Field(default=None, description="Null = `training.optimizer`.")
    beta1: float | None = Field(default=None, ge=0, lt=1, description="Null = `training.adam_beta1`.")
    beta2: float | None = Field(default=None, ge=0, lt=1, description="Null = `training.adam_beta2`.")
    epsilon: float | None = Field(default=None, ge=1e-30, le=1_000_000, description="Null = `training.adam_epsilon`.")
    weight_decay: float | None = Field(default=None, ge=0, le=1_000_000, description="Null = `training.weight_decay`.")
    max_grad_norm: float | None = Field(
        default=None, ge=0, le=1_000_000, description="0 = no limit; null = `training.max_grad_norm`."
    )
    scheduler: SchedulerName | None = Field(default=None, description="Null = `training.lr_scheduler`.")
    warmup_steps: int | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Null = `training.warmup_steps`."
    )
    min_lr_ratio: float | None = Field(
        default=None, ge=0, le=1, description="The last step has this share of the learning rate; null = 0."
    )
    cycles: int | None = Field(default=None, ge=1, le=1_000_000, description="Null = `training.lr_cycles`.")
    power: float | None = Field(default=None, ge=0.01, le=100, description="Null = `training.lr_power`.")
    moments_dtype: MomentsDtype | None = Field(
        default=None, description="`adamw`: in what its moments are kept; null = `optimizer.moments_dtype`."
    )


class OptimizerConfig(Section):
    """Where one half is to differ from what `training` says of both, and what decays."""

    decay_norms_and_biases: bool = Field(
        default=False,
        description="Let weight decay act on biases and on the scales of norms too; false = on matrices alone.",
    )
    moments_dtype: MomentsDtype = Field(
        default="float32",
        description="`adamw`: in what its two moments are kept; `bfloat16` takes half the bytes, rounded by chance.",
    )
    ar: OptimizerPartConfig = OptimizerPartConfig()
    dit: OptimizerPartConfig = OptimizerPartConfig()
    unet: OptimizerPartConfig = OptimizerPartConfig()
    autoencoder: OptimizerPartConfig = OptimizerPartConfig()
    generator: OptimizerPartConfig = OptimizerPartConfig()
