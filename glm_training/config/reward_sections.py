"""The reward section: metrics, how rewards become policy updates, and the metrics' own options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from glm_training.config.base import FilePath, Section

METRICS = ("lpips", "aesthetic", "text_accuracy", "structure")
"""Metrics that come with the package; any other is named `module:Class` or `path/to/file.py:Class`."""
CLASS_PATTERN = r"^([A-Za-z_][\w.]*|.*[^/\\]\.py):[A-Za-z_]\w*$"


class GRPOPartConfig(Section):
    """Policy update of the AR half; null = what `reward.grpo` says."""

    kl_coef: float | None = Field(default=None, ge=0, description="Null = `reward.grpo.kl_coef`.")
    clip_range: float | None = Field(
        default=None, gt=0, description="Symmetric clip range of this half; null = both ranges of `reward.grpo`."
    )
    updates_per_rollout: int | None = Field(default=None, ge=1, description="Null = `reward.grpo.updates_per_rollout`.")


class GRPODiTConfig(GRPOPartConfig):
    """Policy update of the DiT half; null = what `reward.grpo` says."""

    method: Literal["flow_grpo", "nft"] = Field(
        default="flow_grpo", description="Policy gradient over noisy denoising steps, or DiffusionNFT on final images."
    )
    nft_beta: float = Field(default=1.0, gt=0, description="NFT: mix of the trained and the old velocity.")
    advantage_max: float = Field(default=5.0, gt=0, description="NFT: advantage that counts as fully good.")
    nft_timesteps_per_sample: int | None = Field(
        default=None, ge=1, description="NFT: noise levels trained per image, out of the rollout's; null = all."
    )
    old_decay: Literal["fast", "slow"] | Annotated[float, Field(ge=0, le=1)] = Field(
        default="fast",
        description="NFT: decay of the old policy: min(k/1000, 0.5), or 0 for 75 steps then rising to 0.999, or fixed.",
        json_schema_extra={"allowed": "`fast`, `slow` or a number >= 0 and <= 1"},
    )


class GRPOConfig(Section):
    """Group-relative policy optimization: from rewards to updates."""

    num_samples: int = Field(
        default=4,
        ge=1,
        description="Images per prompt: plans x renders.",
        json_schema_extra={"default_text": "4, or what `rollout` says of plans and renders"},
    )
    kl_coef: float = Field(
        default=0.05, ge=0, description="Weight of the KL to the starting model; 0 = no reference model."
    )
    clip_range: float = Field(default=0.2, gt=0, description="PPO clip of the probability ratio below 1 (and above).")
    clip_range_high: float | None = Field(default=None, gt=0, description="Clip above 1; null = `clip_range`.")
    advantage_scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="Rewards are divided by the spread of their group, of the whole batch, or not at all.",
    )
    advantage_clip: float = Field(default=5.0, gt=0, description="Advantages are cut to plus and minus this.")
    updates_per_rollout: int = Field(default=1, ge=1, description="Optimizer steps on one set of samples.")
    loss_aggregation: Literal["sequence_mean", "token_mean"] = Field(
        default="sequence_mean", description="AR: mean over samples of their token means, or over all tokens alike."
    )
    ratio_level: Literal["token", "sequence"] = Field(
        default="token", description="AR: a probability ratio per token, or one per sample (GSPO)."
    )
    shuffle_advantages: bool = Field(
        default=False,
        description="Control experiment: advantages go to the wrong samples, so that nothing can be learned.",
    )
    gate: bool = Field(
        default=True,
        description="Before the first update, check that replayed log-probs equal the rollout's; stop if not.",
    )
    gate_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="Largest difference it lets pass: nats per token, ratio per denoising step. Null = 1e-4; in "
        "low precision 0.05 on the average of the tokens and 1e-3 of the steps.",
    )
    ar: GRPOPartConfig = GRPOPartConfig()
    dit: GRPODiTConfig = GRPODiTConfig()


class TextAccuracyConfig(Section):
    """Reading the quoted text of the prompt off the image."""

    engine: Literal["rapidocr", "pytesseract"] = Field(default="rapidocr", description="OCR engine.")
    language: str | None = Field(
        default=None,
        min_length=1,
        description="In the engine's own words, as `en` or `eng`; null = the engine's default.",
    )
    extra_text_penalty: float = Field(
        default=0.2, ge=0, description="Taken off per wanted character's worth of text that nobody asked for."
    )
    min_confidence: float = Field(
        default=0.5, ge=0, le=1, description="Readings of which the engine is less sure than this count as not read."
    )


class LPIPSConfig(Section):
    """Perceptual distance to the target."""

    backbone_weights: FilePath | None = Field(
        default=None, description="Its ImageNet weights; null = looked for in torch hub's cache."
    )


class AestheticConfig(Section):
    """LAION aesthetic predictor: an MLP on a CLIP embedding."""

    clip_name: str = Field(
        default="openai/clip-vit-large-patch14", min_length=1, description="Hub id or folder of the CLIP."
    )
    mlp_weights: FilePath | None = Field(
        default=None,
        description="Weights of the MLP (`sac+logos+ava1-l14-linearMSE`); null = looked for in torch hub's cache.",
    )


class StructureConfig(Section):
    """Structural similarity (SSIM)."""

    reference: Literal["source", "target"] | None = Field(
        default=None, description="Image to compare with; null = the source in i2i, the target in t2i."
    )


class RewardOptionsConfig(Section):
    """Options of the metrics that come with the package."""

    text_accuracy: TextAccuracyConfig = TextAccuracyConfig()
    lpips: LPIPSConfig = LPIPSConfig()
    aesthetic: AestheticConfig = AestheticConfig()
    structure: StructureConfig = StructureConfig()


class RewardConfig(Section):
    """What is rewarded."""

    enabled: bool = Field(
        default=True, description="False = no rewards at all: supervised training, and no scores in the evaluation."
    )
    target_images_dir: FilePath | None = Field(
        default=None, description="Images to reach; also `data.target_images_dir` unless that is given."
    )
    metrics: list[str] | dict[str, float] | None = Field(
        default=None,
        description="`lpips`, `aesthetic`, `text_accuracy`, `structure`, `module:Class` or `path/to/file.py:Class`; "
        "null = those in `weights`.",
        json_schema_extra={"allowed": "list of metrics, mapping of metric to number > 0 or null"},
    )
    weights: dict[str, float] | None = Field(
        default=None,
        description="Weight of each metric; null = in `metrics`.",
        json_schema_extra={
            "allowed": "mapping of metric to number > 0 or null",
            "default_text": "lpips 0.4, aesthetic 0.3, text_accuracy 0.3 "
            "(i2i: 0.35, 0.25, 0.25, structure 0.15); null if `metrics` is given",
        },
    )
    calculator: str | None = Field(
        default=None,
        pattern=CLASS_PATTERN,
        description="A RewardCalculator subclass in the metrics' place; null = RewardCalculator itself.",
        json_schema_extra={"allowed": "`module:Class`, `path/to/file.py:Class` or null"},
    )
    ar_reward_weight: float = Field(
        default=1.0, ge=0, description="Scale of the AR half's advantages; its KL keeps its own weight."
    )
    dit_reward_weight: float = Field(
        default=1.0, ge=0, description="Scale of the DiT half's advantages; its KL keeps its own weight."
    )
    on_error: Literal["error", "skip"] = Field(
        default="error", description="A sample that cannot be scored stops the run, or is left out and counted."
    )
    grpo: GRPOConfig = GRPOConfig()
    options: RewardOptionsConfig = RewardOptionsConfig()

    def metric_weights(self) -> dict[str, float]:
        """Metric to weight, in whichever of the two forms the file gives it. Valid after loading."""
        if isinstance(self.metrics, dict):
            return dict(self.metrics)
        weights = self.weights or {}
        return dict(weights) if self.metrics is None else {name: weights[name] for name in self.metrics}
