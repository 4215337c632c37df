"""VGT: the `vgt` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import FilePath, PlaceName, Section

DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


class GANConfig(Section):
    """The discriminator of the autoencoder's training. It is untouched, and nobody asks it, before `start_step`."""

    start_step: int | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Training step from which it counts; null = never."
    )
    weight: float = Field(default=0.1, gt=0, le=1_000_000, description="Of -mean D(fake) in the autoencoder's loss.")
    lecam_weight: float = Field(
        default=1e-3, ge=0, le=1_000_000, description="Of LeCam's penalty in the discriminator's loss; 0 = none."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Of the discriminator; null = the autoencoder's."
    )
    warmup_steps: int = Field(
        default=0, ge=0, le=1_000_000_000, description="Of the discriminator, counted from its start."
    )
    channels: int = Field(default=128, ge=32, le=4096, multiple_of=32, description="Of its first stage.")
    stages: int = Field(default=3, ge=1, le=8, description="Each halves the sides of the picture.")


class RepaConfig(Section):
    """Alignment of the flow head with a vision encoder (REPA)."""

    model: PlaceName | None = Field(
        default=None,
        min_length=1,
        description="DINOv3 ViT, a folder or hub id (facebook/dinov3-vitb16-pretrain-lvd1689m); null = no REPA.",
    )
    weight: float = Field(default=0.5, gt=0, le=1_000_000, description="Of -mean cosine in the loss.")


class VGTConfig(Section):
    """`model.family: vgt`. An autoencoder is made of the vision-language model `model.name` and the decoder of a DC-AE,
    or goes on from a checkpoint or the published file; a generator of the language model of `model.name`, or goes on
    from a checkpoint."""

    decoder: PlaceName = Field(
        default=DC_AE, min_length=1, description="DC-AE whose decoder a new autoencoder starts from: hub id or folder."
    )
    channel_norm: bool | None = Field(
        default=None,
        description="Norm the latents over their channels (stage 2); null = as the checkpoint does, false for a new "
        "one.",
        json_schema_extra={"allowed": "true, false or null"},
    )
    kl: bool = Field(default=False, description="A new autoencoder draws its latents from a learnt Gaussian.")
    latent_noise: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Noise of up to this strength on the latents in training, drawn per image (stage 2: 0.1).",
    )
    encoder_rate_ratio: float = Field(
        default=0.5, ge=0, le=1000, description="Learning rate of the vision encoder, as a share of the rest's."
    )
    distillation_weight: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Of the distance to the features of the frozen vision-language model (stage 2: 0.1); 0 = none.",
    )
    perceptual_weight: float = Field(
        default=1.1, gt=0, le=1_000_000, description="Of the two perceptual terms together."
    )
    lpips_weights: FilePath | None = Field(
        default=None, description="File of torchvision's VGG-16 for LPIPS; null = without LPIPS."
    )
    convnext_weights: FilePath | None = Field(
        default=None, description="File of torchvision's ConvNeXt-Small for the distance of logits; null = without."
    )
    kl_weight: float = Field(default=1e-6, ge=0, le=1_000_000, description="With `kl`.")
    gan: GANConfig = GANConfig()
    autoencoder: PlaceName | None = Field(
        default=None,
        min_length=1,
        description="Generator: the autoencoder whose latents it draws, a checkpoint, folder or the published file; "
        "null = the one in the folder `model.name`.",
    )
    caption_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="Generator: share of images trained without their caption, for guidance."
    )
    order: Literal["random", "raster"] | None = Field(
        default=None,
        description="Generator: in which order the latents are written; a random one is of each image's own; null = as "
        "the checkpoint does, random for a new one.",
        json_schema_extra={"allowed": "`random`, `raster` or null"},
    )
    timestep_shift: float = Field(
        default=1.4, gt=0, le=1000, description="Generator: above 1 it trains more noise than data."
    )
    repa: RepaConfig = RepaConfig()
