"""Few-step distillation with rewards: the `dmdr` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import FilePath, PlaceName, Section


class DMDRRewardConfig(Section):
    """The differentiable reward of `training.method: dmdr`."""

    method: Literal["refl", "srpo"] = Field(
        default="refl",
        description="`refl` = the scorers on the image and its prompt; `srpo` = `hps_v2` on the difference between the "
        "prompt with positive and with negative words.",
    )
    weights: dict[str, float] = Field(
        default={"clip_h": 0.3, "hps_v2": 0.3},
        description="Scorers and their weights: `clip_h` (DFN5B-CLIP-ViT-H-14), `hps_v2` (HPSv2.1).",
    )
    threshold: float = Field(default=0.7, ge=-1_000_000, le=1_000_000, description="A score above it counts no more.")
    decoder: Literal["taesd", "vae"] = Field(
        default="taesd", description="What decodes the images that are scored; `taesd` needs `model.taesd`."
    )
    clip_h_weights: FilePath | None = Field(
        default=None,
        description="open_clip checkpoint of DFN5B-CLIP-ViT-H-14; null = from the local Hugging Face cache.",
    )
    clip_h_architecture: str = Field(default="ViT-H-14-quickgelu", min_length=1, description="Its open_clip model.")
    positive_words: str | None = Field(
        default=None,
        description="Words before the prompt that `hps_v2` reads; null = none (`srpo`: `Realistic photo.`).",
    )
    negative_words: str = Field(default="CG Render.", min_length=1, description="`srpo`: the words not wanted.")
    srpo_strength: float = Field(
        default=0.1,
        gt=0,
        le=1_000_000,
        description="`srpo`: weight of the positive words is 1 + this, of the negative ones -1.",
    )


class DMDRConfig(Section):
    """`training.method: dmdr`: distribution matching to a frozen teacher, then rewards as well.

    A training step is one update of the guidance network (fake score); the generator is updated at every
    `update_ratio`-th. All lengths count training steps, where the published scripts count the generator's updates.
    """

    student_steps: int = Field(default=4, ge=1, le=1000, description="Denoising steps of the generator.")
    one_step_timestep: int | None = Field(
        default=None,
        ge=0,
        lt=1000,
        description="SDXL with one step: what the network is told of the pure noise it starts from, 399 in DMD2; null "
        "= the last timestep.",
    )
    initial_weights: FilePath | None = Field(
        default=None, description="Weights (.safetensors, .bin) that the generator starts from; null = the teacher's."
    )
    update_ratio: int = Field(
        default=5, ge=1, le=1_000_000_000, description="Updates of the guidance network per generator update."
    )
    plans_per_prompt: int = Field(
        default=4,
        ge=1,
        le=65536,
        description="GLM-Image: plans that the AR half writes for a prompt; they are kept and taken in turn, epoch by "
        "epoch.",
    )
    guidance_rank: int = Field(default=64, ge=1, le=8192, description="Rank of the guidance network's adapter.")
    guidance_alpha: float = Field(
        default=64.0, ge=1e-6, le=1_000_000, description="Its update is scaled by alpha / rank."
    )
    guidance_learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Of the guidance network; null = the generator's."
    )
    fake_scale: float = Field(default=1.0, gt=0, le=1_000_000, description="Strength of the adapter in the fake score.")
    real_scale: float = Field(
        default=0.25, ge=0, le=1_000_000, description="Strength of the adapter in the real score, at first."
    )
    real_guidance_scale: float = Field(
        default=7.0,
        ge=1,
        le=1000,
        description="Classifier-free guidance of the real score.",
        json_schema_extra={"default_text": "7.0 (glm_image: 1.5)"},
    )
    dynamic_guidance: bool = Field(
        default=True, description="DynaDG: `real_scale` falls to 0 along a cosine; false = it is 0 from the start."
    )
    dynamic_renoise: bool = Field(
        default=True, description="DynaRS: noise levels from Beta(4, 1.5) to uniform; false = uniform from the start."
    )
    dynamic_steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Training steps over which both do that; null = `cold_start_steps`, or the run.",
    )
    renoise_range: list[float] = Field(
        default=[0.02, 0.98],
        min_length=2,
        max_length=2,
        description="Noise levels at which generated images are compared, of [0, 1].",
        json_schema_extra={"allowed": "two numbers in [0, 1]"},
    )
    cold_start_steps: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000_000,
        description="Training steps before rewards count; null = no rewards at all.",
    )
    reward: DMDRRewardConfig = DMDRRewardConfig()


class OPDTeacherConfig(Section):
    """A frozen expert; it has adapters or is a whole model."""

    prompts_file: FilePath = Field(
        description="Text file, one prompt per line, of what it answers for; each prompt of the data stands in one "
        "teacher's."
    )
    adapters: PlaceName | None = Field(
        default=None, description="LoRA adapters on the model that is trained: a folder, a checkpoint or a run."
    )
    model: PlaceName | None = Field(
        default=None, description="A model trained whole from the same one: its folder, or a checkpoint."
    )


class OPDConfig(Section):
    """`training.method: opd`: on-policy distillation of several experts into one GLM-Image."""

    teachers: dict[str, OPDTeacherConfig] = Field(
        default={},
        description=f"Experts by name. Keys of each: {', '.join(f'`{key}`' for key in OPDTeacherConfig.model_fields)}.",
        json_schema_extra={"allowed": "mapping of name to section"},
    )
