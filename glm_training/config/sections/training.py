"""What is trained, and how: model, training, rollout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from glm_training.config.sections.base import PlaceName, Section, no_as_text
from glm_training.config.sections.optimization import EMAConfig, OptimizerName, SchedulerName

# What is divided by, or into noise, has a lower bound that fp32 can still tell from 0.


class ModelARConfig(Section):
    """How the autoregressive generator samples its prior tokens."""

    temperature: float = Field(default=0.9, ge=0.01, le=1000, description="Sampling temperature of the prior tokens.")
    top_p: float = Field(
        default=0.75, ge=1e-6, le=1, description="Nucleus of the prior tokens' distribution; 1 = all of it."
    )
    do_sample: bool = Field(default=True, description="Sample prior tokens; false = take the likeliest one.")


class ModelDiTConfig(Section):
    """How the diffusion decoder draws."""

    num_inference_steps: int = Field(default=50, ge=1, le=1000, description="Denoising steps per image.")
    guidance_scale: float = Field(default=1.5, ge=1, le=1000, description="Classifier-free guidance; 1 = off.")


class ModelUNetConfig(Section):
    """How SDXL's UNet draws."""

    num_inference_steps: int = Field(default=50, ge=1, le=1000, description="Denoising steps per image.")
    guidance_scale: float = Field(default=5.0, ge=1, le=1000, description="Classifier-free guidance; 1 = off.")


class ModelGeneratorConfig(Section):
    """How VGT's generator draws."""

    num_inference_steps: int = Field(default=30, ge=2, le=1000, description="Denoising steps per latent.")
    guidance_scale: float = Field(
        default=4.5, ge=1, le=1000, description="Classifier-free guidance of the first latents, fading to 1; 1 = off."
    )
    parallel: int = Field(
        default=1, ge=1, le=4096, description="Latents written at once; above 1 it is faster and less exact."
    )


class ModelConfig(Section):
    """Which model, and which part of it is trained."""

    family: Literal["glm_image", "sdxl", "vgt"] = Field(default="glm_image", description="What kind of model it is.")

    name: PlaceName = Field(
        default="zai-org/GLM-Image",
        min_length=1,
        description="Hub id, local folder, `tiny` (a small GLM-Image in the package; vgt: one that two CPU cores train "
        "from nothing), `tiny-random` (untrained) or `full-width` (GLM-Image's published widths with 2 layers of each "
        "network and random weights: for trying shapes, time and memory).",
        json_schema_extra={
            "default_text": "`zai-org/GLM-Image` (sdxl: `stabilityai/stable-diffusion-xl-base-1.0`, vgt: "
            "`OpenGVLab/InternVL3-1B-hf`)"
        },
    )
    adapters: list[PlaceName] = Field(
        default=[],
        description="LoRA adapters that are merged into the model before anything else, one after the other: folders, "
        "checkpoints or runs, of which it is the newest.",
        json_schema_extra={"allowed": "list of folders"},
    )
    component: Literal["ar", "dit", "both", "unet", "autoencoder", "generator"] = Field(
        default="both",
        description="What is trained: a half of GLM-Image or both; of SDXL the UNet; of VGT one of its two models.",
        json_schema_extra={"default_text": "`both` (sdxl: `unet`, vgt: `generator`)"},
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Type in which the weights are loaded."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="With LoRA: the frozen linear layers in the blocks of what is trained in 8 or 4 bits, by "
        "bitsandbytes.",
    )
    device_map: str | None = Field(
        default=None,
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="Where the run computes: `cpu`, `cuda` (one GPU per process) or one certain GPU of a single "
        "process; null = GPUs where there are any.",
        json_schema_extra={"allowed": "`cpu`, `cuda`, `cuda:<number>` or null"},
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit on the hub; null = the newest."
    )
    local_files_only: bool = Field(default=False, description="Never download; use what is already on this machine.")
    ar: ModelARConfig = ModelARConfig()
    dit: ModelDiTConfig = ModelDiTConfig()
    unet: ModelUNetConfig = ModelUNetConfig()
    generator: ModelGeneratorConfig = ModelGeneratorConfig()
    taesd: PlaceName | None = Field(
        default=None,
        min_length=1,
        description="SDXL: small decoder for rewards, a hub id (madebyollin/taesdxl), folder or `tiny-random`; null = "
        "the folder `taesd` of the model, if there is one.",
    )


class TrainingConfig(Section):
    """The loop, and what both halves share of their optimizers."""

    method: Literal["finetune", "dpo", "dmdr", "opd"] = Field(
        default="finetune",
        description="`finetune` = rewards (GRPO) or target images, as `use_reward` says; `dpo` = preference pairs; "
        "`dmdr` = distillation to few steps; `opd` = on-policy distillation of several experts.",
    )
    mode: Literal["t2i", "i2i"] = Field(default="t2i", description="Text to image, or image (and text) to image.")
    batch_size: int = Field(default=1, ge=1, le=65536, description="Prompts per process and accumulation chunk.")
    gradient_accumulation_steps: int = Field(default=8, ge=1, le=65536, description="Chunks per optimizer step.")
    num_epochs: int = Field(
        default=2,
        ge=1,
        le=1_000_000,
        description="Passes over the prompts.",
        json_schema_extra={"default_text": "2 (i2i: 10)"},
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="Training steps; overrides `num_epochs`."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="For each half without one of its own; null = the documented one of each half.",
        json_schema_extra={"default_text": "null (`prodigy`: 1.0)"},
    )
    ar_learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Of the AR half; null = `learning_rate`, and 5e-6 without that."
    )
    dit_learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Of the DiT half; null = `learning_rate`, and 1e-5 without that."
    )
    optimizer: OptimizerName = Field(
        default="adamw",
        description="Update rule. `adamw_8bit`, `prodigy`, `lion` and `adamw_schedule_free` need the extras "
        "`bitsandbytes`, `prodigy`, `lion` and `schedulefree`.",
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment; the momentum of `sgd`.")
    adam_beta2: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Decay of the second moment; of `lion`, of its momentum.",
        json_schema_extra={"default_text": "0.999 (`lion`: 0.99)"},
    )
    adam_epsilon: float = Field(
        default=1e-8, ge=1e-30, le=1_000_000, description="Added to the root of the second moment."
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        le=1_000_000,
        description="Decoupled weight decay: each step takes learning rate x this off a weight.",
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1_000_000, description="Gradients of a half are scaled to this norm; 0 = no limit."
    )
    lr_scheduler: SchedulerName = Field(
        default="cosine",
        description="Course of the learning rate after the warmup.",
        json_schema_extra={"default_text": "`cosine` (`adamw_schedule_free`: `constant`)"},
    )
    lr_cycles: int = Field(
        default=2,
        ge=1,
        le=1_000_000,
        description="`cosine_with_restarts`: times that the rate falls from its full value.",
    )
    lr_power: float = Field(
        default=1.0, ge=0.01, le=100, description="`polynomial`: power of the share of the run that is left."
    )
    warmup_steps: int = Field(
        default=50,
        ge=0,
        le=1_000_000_000,
        description="Steps in which the learning rate rises from 0.",
        json_schema_extra={"default_text": "50 (i2i: 500)"},
    )
    ema: EMAConfig = EMAConfig()
    gradient_checkpointing: bool = Field(
        default=True, description="Recompute activations in the backward pass to save memory."
    )
    offload_between_phases: bool = Field(
        default=False,
        description="Reward training in one process: weights and moments that a phase of a step has no use for wait "
        "on the CPU.",
    )
    compile: bool = Field(
        default=False,
        description="`torch.compile` of the repeated blocks of what is trained (GLM-Image, SDXL): slow first steps, "
        "faster ones after.",
    )
    mixed_precision: Annotated[Literal["no", "fp32", "bf16", "fp16"], BeforeValidator(no_as_text)] = Field(
        default="bf16", description="Autocast type of the forward passes; `no` and `fp32` = no autocast."
    )
    use_reward: bool = Field(
        default=True,
        description="Reward training; false = supervised finetuning on the target images.",
        json_schema_extra={"default_text": "true (`data.images`: false)"},
    )
    reward_frequency: int = Field(
        default=1,
        ge=1,
        le=1_000_000_000,
        description="Every k-th step is a reward step; the steps between are supervised. 1 = all are.",
    )
    preview_loss_weight: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Supervised AR, t2i: weight of the preview tokens in the cross-entropy.",
    )
    large_loss_weight: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Supervised AR, t2i: weight of the full-size tokens in the cross-entropy.",
    )
    prior_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Supervised DiT and UNet: share of samples trained without condition, or prompt, for guidance.",
    )
    timestep_density: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="Supervised DiT and UNet: distribution of the noise level."
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Supervised UNet: errors weighted by min-SNR with this gamma; null = all alike.",
    )


class RolloutConfig(Section):
    """How the samples of a reward step are drawn: N plans (AR) per prompt, M renders (DiT) per plan."""

    plans_per_prompt: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="N; null = what `reward.grpo.num_samples` = N x M leaves, by `model.component`.",
    )
    renders_per_plan: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="M; null = what `reward.grpo.num_samples` = N x M leaves, by `model.component`.",
    )
    num_inference_steps: int | None = Field(
        default=None, ge=1, le=1000, description="Denoising steps in training; null = `model.dit.num_inference_steps`."
    )
    guidance_scale: float | None = Field(
        default=None, ge=1, le=1000, description="Guidance in training; 1 = off; null = `model.dit.guidance_scale`."
    )
    temperature: float | None = Field(
        default=None, ge=0.01, le=1000, description="In training; null = `model.ar.temperature`."
    )
    top_p: float | None = Field(default=None, ge=1e-6, le=1, description="In training; null = `model.ar.top_p`.")
    sde_kernel: Literal["ode", "flow", "dance", "cps"] = Field(
        default="flow",
        description="Noise of the denoising steps; `ode` = none.",
        json_schema_extra={
            "default_text": "`flow`; `ode` if the DiT is not trained or with method `nft`, `awm` or `dgpo`"
        },
    )
    eta: float = Field(default=0.7, ge=0.01, le=10, description="Strength of that noise.")
    sde_window_size: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Noisy denoising steps, the others being `ode` and without loss; null = all.",
    )
    sde_window_strategy: Literal["all", "progressive", "random", "decay"] = Field(
        default="all",
        description="Where that window lies from step to step of the training: anywhere, or moving from noise to image "
        "(`decay`: faster and faster).",
        json_schema_extra={"default_text": "`all`; `random` with `sde_window_size`"},
    )
    sde_window_range: list[int] | None = Field(
        default=None,
        description="Denoising steps that may be noisy: from the first number up to before the second; null = all.",
        json_schema_extra={"allowed": "two integers or null"},
    )
    sde_window_interval: int = Field(
        default=25,
        ge=1,
        le=1_000_000_000,
        description="`progressive` and `decay`: training steps before the window moves on.",
    )
    branch: bool = Field(
        default=False,
        description="`flow_grpo`: the renders of a plan start from the same noise and part at the first noisy step; "
        "the steps before it are computed once (Flow-GRPO-Fast).",
    )
    rescore: Literal["auto"] | bool = Field(
        default="auto",
        description="Take the log-probs that ratios start from out of the very passes that train, not out of the "
        "sampling, whose other passes round otherwise. `auto` = in bf16 and fp16.",
        json_schema_extra={"allowed": "`auto`, true or false"},
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Samples per forward pass in rollout and replay; null = all at once, but a "
        "replay on the CPU 8 plans.",
    )
    cuda_graph: Literal["auto"] | bool = Field(
        default="auto",
        description="Take the steps in which the AR half writes tokens as a CUDA graph; `auto` = on a GPU, where they "
        "can be recorded; true = end the run where they cannot.",
        json_schema_extra={"allowed": "`auto`, true or false"},
    )
    vae_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Images per VAE pass, of evaluations as well; null = all at once, on the "
        "CPU 8, and in evaluations `rollout.micro_batch_size` or a few.",
    )
