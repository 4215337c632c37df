"""What of a configuration memory, disk and time depend on, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from glm_training.config import Config
from glm_training.config.sections.resolved import ResolvedLora
from glm_training.engine.optimizers import SCHEDULE_FREE
from glm_training.evaluation.held_out import IMAGES_AT_ONCE
from glm_training.models.glm_image.positions import generation_grids

Method = Literal["reward", "supervised", "preference", "distillation"]
Strategy = Literal["single", "ddp", "fsdp"]
Quantization = Literal["none", "int8", "nf4"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 4.127 / 8}
"""Of a weight: 8 bits, the scales of the rows left out; 4 bits with an 8-bit scale per 64 weights and an fp32 one per
256 of those (QLoRA, arXiv:2305.14314)."""

BF16_MOMENTS = "adamw, bf16"
"""`Half.rule` of AdamW with `moments_dtype` bfloat16, the only rule that has it."""


GUIDANCE = "guidance"
"""DMDR's guidance network: the model as it was loaded, with an adapter that is trained, beside the generator."""


@dataclass(frozen=True)
class Half:
    """A part under training: its adapters or itself, its update rule, and which copies of what it trains it keeps
    besides: `copies` counts KL reference (a moving one by that name), policy that drew and slow average, each as large
    as what is trained. `narrow`: moments in bf16. `shown`: whether evaluations see others than the weights."""

    name: str
    lora: ResolvedLora
    optimizer: str
    copies: tuple[str, ...]
    updates: int
    has_kl: bool
    narrow: bool = False
    shown: bool = False

    @property
    def title(self) -> str:
        """Its name in those of phases."""
        return {"ar": "AR", "dit": "DiT", "unet": "UNet"}.get(self.name, self.name)

    @property
    def rule(self) -> str:
        """The update rule by what it keeps."""
        return BF16_MOMENTS if self.narrow else self.optimizer


@dataclass(frozen=True)
class Run:
    """A run. dtype: bytes of a frozen weight. low: bytes of the autocast type, None without autocast. rows: samples in
    a pass; `group` samples of a prompt, `plans` of them different plans. noisy: steps of which both ends are stored;
    means: whether the mean is, too. guided: in rollout and replay. GLM-Image's guided
    passes are two in a row; SDXL's, one of twice the rows. prompt_tokens and
    glyph_tokens are assumed. shards: GPUs over which FSDP spreads a model, 1 without. waits: what lies in shards does
    so on the CPU. by_block: halves in shards that are gathered block by block while they draw. phased: weights and
    moments take turns on the GPU. supervises: other steps than those with rewards learn from targets.
    recrops: pictures are cut and encoded at every step. evaluated: pictures drawn at once to be scored or shown.
    decodes: whether steps look at the pictures that they draw. spares_vae: whether a VAE that fp16 overflows is kept
    in fp32. teachers: of on-policy distillation, what each of them is."""

    family: str
    component: str
    method: Method
    halves: tuple[Half, ...]
    dtype: int
    low: int | None
    checkpointing: bool
    batch_size: int
    accumulation: int
    micro: int | None
    vae_micro: int | None
    plans: int
    renders: int
    steps: int
    noisy: int
    means: bool
    guided: bool
    evaluation_guided: bool
    evaluated: int
    height: int
    width: int
    mode: str
    keeps_support: bool
    caches: bool
    metrics: tuple[str, ...]
    gpus: int
    strategy: Strategy
    shards: int
    quantization: Quantization
    waits: bool = False
    by_block: tuple[str, ...] = ()
    phased: bool = False
    supervises: bool = False
    recrops: bool = False
    decodes: bool = True
    spares_vae: bool = False
    teachers: tuple[Literal["model", "adapters"], ...] = ()
    prompt_tokens: int = 128
    glyph_tokens: int = 32

    @property
    def patches(self) -> int:
        """Tokens of a picture in the DiT."""
        return (self.height // 16) * (self.width // 16)

    @property
    def written(self) -> int:
        """Tokens that the AR half writes."""
        mode: Literal["t2i", "i2i"] = "i2i" if self.mode == "i2i" else "t2i"
        grids = generation_grids(self.height, self.width, mode)
        return sum(rows * columns for rows, columns in grids)

    @property
    def read(self) -> int:
        """Tokens of a prompt, its source's among them."""
        source = (self.height // 32) * (self.width // 32) if self.mode == "i2i" else 0
        return self.prompt_tokens + source

    @property
    def seen(self) -> int:
        """Tokens of a row in the DiT: picture, quoted words, and source."""
        return self.patches * (2 if self.mode == "i2i" else 1) + self.glyph_tokens

    @property
    def keeps_pictures(self) -> bool:
        """Whether pictures are encoded once, and their encoders then sleep."""
        return self.caches and not self.recrops

    @property
    def group(self) -> int:
        """Images per prompt."""
        return self.plans * self.renders


def read_run(config: Config, *, gpus: int = 1, strategy: str | None = None) -> Run:
    """The run of a configuration on so many GPUs. `strategy` takes the place of `distributed.strategy`; `auto` counts
    as DDP."""
    model = config.model
    wanted = strategy or config.distributed.strategy
    chosen: Strategy = "single" if gpus == 1 else "fsdp" if wanted == "fsdp" else "ddp"
    grpo, rollout, sampling = config.reward.grpo, config.rollout, config.rollout_sampling()
    group = config.group() if config.draws_in_steps() else None
    noisy = 0
    if config.draws_in_steps() and "dit" in config.parts() and rollout.sde_kernel != "ode":
        noisy = min(rollout.sde_window_size or sampling.num_inference_steps, sampling.num_inference_steps)
    return Run(
        family=model.family,
        component=model.component,
        method=_method(config),
        halves=_halves(config),
        dtype=DTYPE_BYTES[model.torch_dtype],
        low={"bf16": 2, "fp16": 2}.get(config.training.mixed_precision),
        checkpointing=config.training.gradient_checkpointing,
        batch_size=config.training.batch_size,
        accumulation=config.training.gradient_accumulation_steps,
        micro=rollout.micro_batch_size,
        vae_micro=rollout.vae_batch_size,
        plans=1 if group is None else group.plans,
        renders=1 if group is None else group.renders,
        steps=sampling.num_inference_steps,
        noisy=noisy,
        means=grpo.dit.ratio == "guard" or grpo.dit.divergence_threshold is not None,
        guided=sampling.guidance_scale > 1,
        evaluation_guided=config.evaluation_sampling().guidance_scale > 1,
        evaluated=_evaluated(config, gpus),
        height=config.data.image_size.height,
        width=config.data.image_size.width,
        mode=config.training.mode,
        keeps_support=sampling.top_p < 1,
        caches=config.caches(),
        metrics=_metrics(config),
        gpus=gpus,
        strategy=chosen,
        shards=1 if chosen != "fsdp" else (config.distributed.shard_size or gpus),
        quantization=model.quantization,
        waits=config.distributed.offload and chosen == "fsdp",
        by_block=tuple(config.parts()) if config.distributed.gather == "block" and chosen == "fsdp" else (),
        phased=config.training.offload_between_phases,
        supervises=config.uses_reward() and config.uses_supervision(),
        recrops=config.crops_at_random(),
        decodes=config.training.method != "opd",
        spares_vae=model.family == "sdxl" and model.torch_dtype == "float16",
        teachers=_teachers(config),
    )


def _method(config: Config) -> Method:
    if config.training.method == "dpo":
        return "preference"
    if config.training.method == "dmdr":
        return "distillation"
    return "reward" if config.draws_in_steps() else "supervised"


def _halves(config: Config) -> tuple[Half, ...]:
    """What is trained, DMDR's guidance network among it, and the discriminator of VGT's autoencoder where there will be
    one."""
    halves = tuple(_half(config, part) for part in config.parts())
    if config.training.method == "dmdr":
        adapter = replace(halves[0].lora, enabled=True, rank=config.dmdr.guidance_rank)
        shown = halves[0].optimizer == SCHEDULE_FREE
        return (*halves, replace(halves[0], name=GUIDANCE, lora=adapter, copies=(), shown=shown))
    start, last = config.vgt.gan.start_step, config.training.max_steps
    if config.model.component != "autoencoder" or start is None or (last is not None and start >= last):
        return halves
    return (*halves, replace(halves[0], name="discriminator", copies=()))


def _half(config: Config, part: Any) -> Half:
    lora, policy = config.lora_for(part), config.policy_for(part)
    copies: list[str] = []
    compares = config.needs_reference(part)
    if config.training.method == "dpo":
        compares = config.dpo.loss == "dpo" and not (part == "ar" and not lora.enabled)
    fresh = lora.enabled and config.lora.start_from is None  # the reference is the model with its adapters off
    if compares and not (fresh and (config.reward.grpo.reference == "start" or config.training.method == "dpo")):
        moves = config.training.method != "dpo" and config.reward.grpo.reference == "ema"
        copies.append("moving reference" if moves else "reference")
    if config.uses_reward() and part == "dit" and config.reward.grpo.dit.method == "nft":
        copies.append("policy that draws")
    ema, optimizer = config.training.ema, config.optimizer_for(part)
    if ema.decay is not None:
        copies.append("average")
    shown = optimizer.name == SCHEDULE_FREE or (ema.decay is not None and ema.evaluate)
    updates = policy.updates_per_rollout if config.uses_reward() else 1
    narrow = optimizer.name == "adamw" and optimizer.moments_dtype == "bfloat16"
    return Half(part, lora, optimizer.name, tuple(copies), updates, compares, narrow, shown)


def _evaluated(config: Config, gpus: int) -> int:
    """Images that a process draws at once for scores, its share of them, or samples, which each draws; 0 where none
    are."""
    if not (config.evaluation.enabled or config.logging.log_images):
        return 0
    samples, prompts = config.evaluation.samples_per_prompt, math.ceil(config.evaluation.num_eval_samples / gpus)
    drawn = [min(prompts, max(1, IMAGES_AT_ONCE // samples)) * samples] * config.evaluation.enabled
    drawn += [config.logging.num_log_images] * config.logging.log_images
    at_once = config.rollout.micro_batch_size
    return min(max(drawn), at_once or max(drawn))


def _teachers(config: Config) -> tuple[Literal["model", "adapters"], ...]:
    if config.training.method != "opd":
        return ()
    return tuple("adapters" if each.model is None else "model" for each in config.opd.teachers.values())


def _metrics(config: Config) -> tuple[str, ...]:
    names: Mapping[str, float] = config.scored_weights() if config.reward.enabled else {}
    return tuple(names)
