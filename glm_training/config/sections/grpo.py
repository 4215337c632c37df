"""The reward.grpo section: how rewards become policy updates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from glm_training.config.sections.base import Section


class GRPOPartConfig(Section):
    """Policy update of one half; null = what `reward.grpo` says."""

    kl_coef: float | None = Field(default=None, ge=0, le=1_000_000, description="Null = `reward.grpo.kl_coef`.")
    clip_range: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Clip range of this half; null = both ranges of `reward.grpo`."
    )
    clip_range_high: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Clip above 1 of this half; null = as below."
    )
    updates_per_rollout: int | None = Field(
        default=None, ge=1, le=65536, description="Null = `reward.grpo.updates_per_rollout`."
    )
    advantage_scale: Literal["group", "batch", "none"] | None = Field(
        default=None, description="Null = `reward.grpo.advantage_scale`."
    )
    skip_flat_groups: bool = Field(
        default=False,
        description="Groups whose advantages are all zero are left out of the loss with their KL, as if not drawn.",
    )


class GRPOARConfig(GRPOPartConfig):
    """Policy update of the AR half; null = what `reward.grpo` says."""

    objective: Literal["ppo", "cispo"] = Field(
        default="ppo",
        description="Clipped ratio, or CISPO: a capped ratio as weight, every token keeps its gradient.",
    )
    cispo_cap: float = Field(
        default=5.0, ge=1, le=1_000_000, description="CISPO: largest ratio that counts, in the clip's place."
    )
    entropy_coef: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="Weight of the entropy bonus (nats per token, of the sampled distribution).",
    )
    preview_weight: float = Field(
        default=1.0, ge=0, le=1_000_000, description="T2i: weight of the preview tokens in the loss."
    )
    large_weight: float = Field(
        default=1.0, ge=0, le=1_000_000, description="T2i: weight of the full-size tokens in the loss."
    )
    similarity_weighting: bool = Field(
        default=False,
        description="A token's advantage counts less the more it looks like those at its place of plans that fared "
        "otherwise, and its KL more (STAGE).",
    )
    entropy_reward: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="Weight of the reward for an entropy near the reference's, between plans that share the best "
        "reward of their prompt (STAGE: 0.4).",
    )


class GRPODiTConfig(GRPOPartConfig):
    """Policy update of the DiT half; null = what `reward.grpo` says."""

    kl_coef: float | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="In the unit of its KL: of a noisy step (`flow_grpo`; 1/abs(dt) times the published code's), "
        "or the squared velocity difference (`nft`, `awm`, `dgpo`, `kl_form: velocity`). Null = `reward.grpo.kl_coef`.",
        json_schema_extra={
            "default_text": "0.004 (`nft` and `kl_form: velocity` 1e-4, `awm` 3e-3, `dgpo` 0.02); "
            "`null` where `reward.grpo.kl_coef` is given"
        },
    )
    method: Literal["flow_grpo", "nft", "awm", "dgpo"] = Field(
        default="flow_grpo",
        description="Policy gradient over noisy denoising steps; or on final images alone: DiffusionNFT, "
        "advantage-weighted matching, or direct group preference optimization.",
    )
    compared_with: Literal["plan", "prompt"] = Field(
        default="plan",
        description="The renders that a render is compared with: those of its own plan, or all of the prompt, for what "
        "plans have no say in (docs/credit_tree.md).",
    )
    ratio: Literal["plain", "guard"] = Field(
        default="plain",
        description="`flow_grpo`: likelihood ratios as they are, or centred and of one size at all steps (GRPO-Guard).",
    )
    divergence_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="`flow_grpo`: in the clip's place, a KL per step beyond which nothing is pushed further out "
        "(Flow-DPPO); null = clip.",
    )
    noise_weighting: bool = Field(
        default=False,
        description="`flow_grpo`: a step's policy loss is weighted by its noise, s sqrt(abs(dt)) over the mean of the "
        "schedule's, so that early steps count more (TempFlow-GRPO).",
    )
    kl_form: Literal["step", "velocity"] = Field(
        default="step",
        description="`flow_grpo`: the KL of the Gaussian steps, or the squared velocity difference in its place "
        "(UniGRPO).",
    )
    timesteps_per_sample: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="NFT, AWM, DGPO: noise levels trained per image, out of the rollout's; null = all.",
    )
    noisiest_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="DGPO: share of the rollout's noise levels, from the noisiest on, that are trained; at the last "
        "ones few steps leave their traces.",
    )
    dgpo_beta: float = Field(
        default=100.0,
        gt=0,
        le=1_000_000,
        description="DGPO: scale of the group's preference under the sigmoid (published: 10 to 100).",
    )
    huber: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="AWM: error beyond which the matching loss grows linearly; null = squares.",
    )
    nft_beta: float = Field(
        default=1.0, ge=1e-4, le=1_000_000, description="NFT: mix of the trained and the old velocity."
    )
    advantage_max: float = Field(
        default=5.0, gt=0, le=1_000_000, description="NFT: advantage that counts as fully good."
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
        le=65536,
        description="Images per prompt: plans x renders.",
        json_schema_extra={"default_text": "4, or what `rollout` says of plans and renders"},
    )
    kl_coef: float = Field(
        default=0.05,
        ge=0,
        le=1_000_000,
        description="Weight of the KL to the starting model, in the unit of each half (AR: nats per token); 0 = no "
        "reference model.",
    )
    clip_range: float = Field(
        default=0.2, gt=0, le=1_000_000, description="PPO clip of the probability ratio below 1 (and above)."
    )
    clip_range_high: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Clip above 1; null = `clip_range`."
    )
    advantage_scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="Rewards are divided by the spread of their group, of the whole batch, or not at all.",
    )
    advantage_clip: float = Field(
        default=5.0, gt=0, le=1_000_000, description="Advantages are cut to plus and minus this."
    )
    updates_per_rollout: int = Field(default=1, ge=1, le=65536, description="Optimizer steps on one set of samples.")
    loss_aggregation: Literal["sequence_mean", "token_mean", "constant"] = Field(
        default="sequence_mean",
        description="AR: mean over samples of their token means, over all tokens alike, or the sum over a constant "
        "(Dr.GRPO: the tokens of an image).",
    )
    ratio_level: Literal["token", "sequence"] = Field(
        default="token", description="AR: a probability ratio per token, or one per sample (GSPO)."
    )
    max_resamples: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="Rounds in which groups of equal rewards are drawn again, with the next prompts (DAPO); 0 = none.",
    )
    reference: Literal["start", "ema"] = Field(
        default="start", description="What the KL is measured against: the starting model, or a slow average."
    )
    reference_decay: float = Field(default=0.99, ge=0, le=1, description="Per step, of that average.")
    shuffle_advantages: bool = Field(
        default=False,
        description="Control experiment: advantages go to the wrong samples, so that nothing can be learned.",
    )
    gate: bool = Field(
        default=True,
        description="Before the first update, check that replayed log-probs equal the rollout's; stop if not.",
    )
    gate_interval: int | None = Field(
        default=50,
        ge=1,
        le=1_000_000_000,
        description="Training steps before that is checked again; null = before the first update alone.",
    )
    gate_tolerance: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Largest difference it lets pass: nats per token, ratio per denoising step. Null = 1e-4; in "
        "low precision 0.05 on the average of the tokens and 1e-3 of the steps.",
    )
    ar: GRPOARConfig = GRPOARConfig()
    dit: GRPODiTConfig = GRPODiTConfig()
