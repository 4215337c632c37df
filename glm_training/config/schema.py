"""The configuration of a run: one class per section, and what its keys come to together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from glm_training.config.sections.base import FilePath, Part, Section
from glm_training.config.sections.data import DataConfig
from glm_training.config.sections.defaults import default_weights, with_dependent_defaults
from glm_training.config.sections.distillation import DMDRConfig, OPDConfig
from glm_training.config.sections.optimization import LoraConfig, OptimizerConfig
from glm_training.config.sections.preference import DPOConfig
from glm_training.config.sections.resolved import (
    ResolvedLora,
    ResolvedOptimizer,
    ResolvedPolicy,
    ResolvedSampling,
    RolloutGroup,
    split_group,
)
from glm_training.config.sections.reward import RewardConfig
from glm_training.config.sections.reward_options import REMOTE_PREFIX
from glm_training.config.sections.run import (
    CacheConfig,
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    ResumeConfig,
)
from glm_training.config.sections.training import (
    ModelConfig,
    ModelDiTConfig,
    ModelGeneratorConfig,
    ModelUNetConfig,
    RolloutConfig,
    TrainingConfig,
)
from glm_training.config.sections.vgt import VGTConfig

T = TypeVar("T")
DOCUMENTED_LEARNING_RATE: dict[Part, float] = {
    "ar": 5e-6,
    "dit": 1e-5,
    "unet": 1e-5,
    "autoencoder": 3e-4,
    "generator": 3e-4,
}


def first(*values: T | None) -> T:
    """The first value that is not None: an override before what it inherits."""
    for value in values:
        if value is not None:
            return value
    raise ValueError("every value is None")


class Config(Section):
    """A run. Keys are read as `config.training.batch_size`; what several keys decide together has a method here."""

    seed: int = Field(default=42, ge=0, le=2**63 - 1, description="From which every random draw of the run derives.")
    output_dir: FilePath = Field(
        default=Path("runs/default"),
        description="The run directory.",
        json_schema_extra={"default_text": "`runs/<name of the config file>`"},
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    dpo: DPOConfig = DPOConfig()
    dmdr: DMDRConfig = DMDRConfig()
    opd: OPDConfig = OPDConfig()
    vgt: VGTConfig = VGTConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distributed: DistributedConfig = DistributedConfig()
    cache: CacheConfig = CacheConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resume: ResumeConfig = ResumeConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_dependent_defaults(cls, raw: Any) -> Any:
        return with_dependent_defaults(raw, cls)

    def parts(self) -> tuple[Part, ...]:
        """The parts that are trained, in the order AR, DiT."""
        component = self.model.component
        return ("ar", "dit") if component == "both" else (component,)

    def uses_reward(self) -> bool:
        """Whether the run has reward steps (GRPO). `reward.enabled: false` turns them off, whatever `use_reward`
        says."""
        return self.training.method == "finetune" and self.training.use_reward and self.reward.enabled

    def uses_supervision(self) -> bool:
        """Whether the run has supervised steps on target images: all of them, or those between the reward steps."""
        finetunes = self.training.method == "finetune" and self.model.family != "vgt"
        return finetunes and (not self.uses_reward() or self.training.reward_frequency > 1)

    def draws_in_steps(self) -> bool:
        """Whether steps draw plans and renders: those with rewards, and on-policy distillation."""
        return self.uses_reward() or self.training.method == "opd"

    def low_precision(self) -> bool:
        """Whether forward passes round to fewer bits than fp32 has."""
        return self.training.mixed_precision in ("bf16", "fp16") or self.model.torch_dtype != "float32"

    def rescores(self) -> bool:
        """Whether ratios start from log-probs of the training passes: `rollout.rescore`."""
        asked = self.rollout.rescore
        return self.low_precision() if asked == "auto" else asked

    def group(self) -> RolloutGroup:
        """Plans per prompt and renders per plan; their product is `reward.grpo.num_samples`."""
        rollout = self.rollout
        group = split_group(
            self.model.component, self.reward.grpo.num_samples, rollout.plans_per_prompt, rollout.renders_per_plan
        )
        if group is None:
            raise ValueError("reward.grpo.num_samples does not split into plans x renders")
        return group

    def optimizer_for(self, part: Part) -> ResolvedOptimizer:
        """Optimizer of one part: `optimizer.<part>`, then `training`, then the documented default."""
        shared, own = self.training, getattr(self.optimizer, part)
        part_rate = getattr(shared, f"{part}_learning_rate") if part in ("ar", "dit") else None
        return ResolvedOptimizer(
            name=first(own.name, shared.optimizer),
            learning_rate=first(own.learning_rate, part_rate, shared.learning_rate, DOCUMENTED_LEARNING_RATE[part]),
            beta1=first(own.beta1, shared.adam_beta1),
            beta2=first(own.beta2, shared.adam_beta2),
            epsilon=first(own.epsilon, shared.adam_epsilon),
            weight_decay=first(own.weight_decay, shared.weight_decay),
            max_grad_norm=first(own.max_grad_norm, shared.max_grad_norm),
            scheduler=first(own.scheduler, shared.lr_scheduler),
            warmup_steps=first(own.warmup_steps, shared.warmup_steps),
            min_lr_ratio=first(own.min_lr_ratio, 0.0),
            decay_norms_and_biases=self.optimizer.decay_norms_and_biases,
            cycles=first(own.cycles, shared.lr_cycles),
            power=first(own.power, shared.lr_power),
            moments_dtype=first(own.moments_dtype, self.optimizer.moments_dtype),
        )

    def policy_for(self, part: Part) -> ResolvedPolicy:
        """Policy update of one half. Its own `clip_range` is symmetric unless it has a `clip_range_high`; without one
        it takes both shared ranges."""
        grpo, own = self.reward.grpo, self.reward.grpo.ar if part == "ar" else self.reward.grpo.dit
        return ResolvedPolicy(
            reward_weight=self.reward.ar_reward_weight if part == "ar" else self.reward.dit_reward_weight,
            kl_coef=first(own.kl_coef, grpo.kl_coef),
            clip_low=first(own.clip_range, grpo.clip_range),
            clip_high=first(own.clip_range_high, own.clip_range, grpo.clip_range_high, grpo.clip_range),
            updates_per_rollout=first(own.updates_per_rollout, grpo.updates_per_rollout),
            advantage_scale=first(own.advantage_scale, grpo.advantage_scale),
            skip_flat_groups=own.skip_flat_groups,
        )

    def needs_reference(self, part: Part) -> bool:
        """Whether reward steps compare a part with its reference: for the KL, or as DGPO and an entropy reward do."""
        grpo = self.reward.grpo
        asked = grpo.dit.method == "dgpo" if part == "dit" else grpo.ar.entropy_reward > 0
        return self.uses_reward() and (asked or self.policy_for(part).kl_coef > 0)

    def reward_weights_for(self, part: Part) -> dict[str, float] | None:
        """Weights of the metrics for one half alone; None where both share `metric_weights`, and of one that is not
        trained, whose metrics need not be there."""
        return (self.reward.ar if part == "ar" else self.reward.dit).weights if part in self.parts() else None

    def scored_weights(self) -> dict[str, float]:
        """Every metric that is computed, with its weight in the total; 0 for what counts for one half alone."""
        weights = {name: 0.0 for part in self.parts() for name in self.reward_weights_for(part) or ()}
        return weights | self.reward.metric_weights()

    def lora_for(self, part: Part) -> ResolvedLora:
        """Adapters of one part: `lora.<part>`, then `lora`. VGT's models are trained whole."""
        shared = self.lora
        if part in ("autoencoder", "generator"):
            return ResolvedLora(False, shared.rank, shared.alpha, shared.dropout, ())
        own = getattr(shared, part)
        return ResolvedLora(
            enabled=first(own.enabled, shared.enabled),
            rank=first(own.rank, shared.rank),
            alpha=first(own.alpha, shared.alpha),
            dropout=first(own.dropout, shared.dropout),
            targets=tuple(getattr(shared, f"{part}_targets")),
        )

    def rollout_sampling(self) -> ResolvedSampling:
        """How training rollouts are drawn: `rollout`, then `model`."""
        rollout, model = self.rollout, self.model
        return ResolvedSampling(
            temperature=first(rollout.temperature, model.ar.temperature),
            top_p=first(rollout.top_p, model.ar.top_p),
            do_sample=model.ar.do_sample,
            num_inference_steps=first(rollout.num_inference_steps, model.dit.num_inference_steps),
            guidance_scale=first(rollout.guidance_scale, model.dit.guidance_scale),
        )

    def evaluation_sampling(self) -> ResolvedSampling:
        """How evaluation and sample images are drawn: `evaluation`, then `model`."""
        evaluation, model = self.evaluation, self.model
        renders: ModelDiTConfig | ModelUNetConfig | ModelGeneratorConfig = model.dit
        if model.family != "glm_image":
            renders = model.unet if model.family == "sdxl" else model.generator
        return ResolvedSampling(
            temperature=model.ar.temperature,
            top_p=model.ar.top_p,
            do_sample=model.ar.do_sample,
            num_inference_steps=first(evaluation.num_inference_steps, renders.num_inference_steps),
            guidance_scale=first(evaluation.guidance_scale, renders.guidance_scale),
            parallel=model.generator.parallel,
        )

    def names_metrics(self) -> bool:
        """Whether it is known what to score by; else held-out scores are those of `default_weights` that can be had."""
        return self.reward.calculator is not None or bool(self.reward.metric_names())

    def default_weights(self) -> dict[str, float]:
        """The metrics of a run that names none."""
        return default_weights(self.training.mode)

    def dataset_file(self) -> Path:
        """What lists the prompts: `data.metadata_file`, or else `data.prompts_file`; of sets of pictures the first."""
        sets = self.data.images
        return first(self.data.pairs, self.data.metadata_file, self.data.prompts_file, sets[0].path if sets else None)

    def target_reason(self) -> str | None:
        """Why the metrics need target images, in words; None if none of those that come with the package does, or a
        calculator of the user's stands in their place."""
        if self.reward.calculator is not None:
            return None
        names = self.reward.metric_names() if self.reward.enabled else set()
        if "lpips" in names:
            return "the metric `lpips` compares with target images"
        if "structure" in names and self.structure_reference() == "target":
            return "the metric `structure` compares with target images here"
        for name, remote in self.reward.options.remote.items():
            if f"{REMOTE_PREFIX}{name}" in names and "target" in remote.send:
                return f"the metric `{REMOTE_PREFIX}{name}` is sent target images"
        return None

    def has_own_reward(self) -> bool:
        """Whether a class of the user's is among the rewards; whether that looks at targets cannot be known."""
        names = self.reward.metric_names()
        return self.reward.enabled and (self.reward.calculator is not None or any(":" in name for name in names))

    def target_images_dir(self) -> Path | None:
        """Folder of the target images, named under `data` or under `reward`."""
        return self.data.target_images_dir or self.reward.target_images_dir

    def structure_reference(self) -> str:
        """`source` or `target`: the image that the structure metric compares with."""
        return self.reward.options.structure.reference or ("source" if self.training.mode == "i2i" else "target")

    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoints."""
        return self.checkpoint.save_dir or self.output_dir / "checkpoints"

    def lora_dir(self) -> Path:
        """Folder of the exported adapters."""
        return self.checkpoint.lora_dir or self.output_dir / "lora"

    def tensorboard_dir(self) -> Path:
        """Folder of the TensorBoard files."""
        return self.logging.log_dir or self.output_dir / "tensorboard"

    def index_dir(self) -> Path:
        """Folder of the indexes of tars."""
        return self.data.index_dir or self.output_dir / "cache"

    def caches(self) -> bool:
        """Whether what frozen encoders give is kept, in a run that has some."""
        wanted = first(self.dpo.cache, self.cache.enabled)
        return wanted and self.model.family != "vgt" and self.training.method != "dmdr"

    def encoded_cache_dir(self) -> Path:
        """Folder of what frozen encoders gave."""
        return self.cache.dir or self.dpo.cache_dir or self.output_dir / "cache"

    def crops_at_random(self) -> bool:
        """Whether pictures are cut anew each time they are met."""
        if self.training.method == "dpo":
            return self.dpo.crop == "random"
        return self.data.images is not None and self.data.crop == "random"

    def drops_prompts(self) -> bool:
        """Whether some samples are trained without their prompt."""
        share = self.dpo.prompt_dropout if self.training.method == "dpo" else self.training.prior_dropout
        return share > 0
