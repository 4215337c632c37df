"""Small autoencoders of VGT's own classes: one with random weights for tests, one that two CPU cores can train."""

from __future__ import annotations

from typing import Any

from glm_training.models.vgt.autoencoder import Autoencoder, AutoencoderConfig


def tiny_random_autoencoder(
    seed: int = 0, *, tower: str = "internvl", channel_norm: bool = True, kl: bool = False
) -> Autoencoder:
    """Pictures of 32 x 32 px, latents [B, 4, 4, 4] (8 px per place); weights depend on `seed` alone."""
    config = AutoencoderConfig(
        tower=tower, tower_config=_internvl(16, 2, 32) if tower == "internvl" else _qwen(), hidden_size=24,
        decoder=_decoder([8, 8, 16, 16], [1, 1, 1, 1], attention_from=2, upsample="interpolate"), image_size=32,
        channel_norm=channel_norm, latent_channels=4, bottleneck_blocks=2, kl=kl,
    )  # fmt: skip
    return Autoencoder(config, seed=seed).eval()


def tiny_trainable_config(channel_norm: bool) -> AutoencoderConfig:
    """One million weights for pictures of coloured shapes and signs at 64 x 64 px; latents [B, 16, 8, 8].

    Its tower starts from nothing, so its residual branches count from the first step on.
    """
    return AutoencoderConfig(
        tower="internvl", tower_config={**_internvl(96, 2, 64), "layer_scale_init_value": 1.0}, hidden_size=96,
        decoder=_decoder([16, 32, 64, 128], [0, 1, 1, 1], attention_from=4, upsample="pixel_shuffle"), image_size=64,
        channel_norm=channel_norm, latent_channels=16, bottleneck_blocks=1,
    )  # fmt: skip


def _internvl(width: int, layers: int, image_size: int) -> dict[str, Any]:
    """4 px a patch, and so 8 px a place."""
    return dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 32),
        intermediate_size=2 * width, image_size=[image_size, image_size], patch_size=[4, 4], attention_bias=True,
    )  # fmt: skip


def _qwen() -> dict[str, Any]:
    """4 px a patch, 8 px a place, windows of 2 x 2 places in its first layer and none in its second."""
    return dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip


def _decoder(channels: list[int], layers: list[int], *, attention_from: int, upsample: str) -> dict[str, Any]:
    """A DC-AE decoder that doubles the sides between levels, the outermost first in both lists; no layers there means
    that its pixels come straight from the next one. Levels from `attention_from` on are of linear attention."""
    inner = [level >= attention_from for level in range(len(channels))]
    return dict(
        attention_head_dim=8, decoder_block_out_channels=channels, decoder_layers_per_block=layers,
        decoder_block_types=["EfficientViTBlock" if attends else "ResBlock" for attends in inner],
        decoder_qkv_multiscales=[[5] if attends else [] for attends in inner], decoder_norm_types="rms_norm",
        decoder_act_fns="silu", decoder_in_shortcut=True, decoder_conv_act_fn="relu", upsample_block_type=upsample,
    )  # fmt: skip
