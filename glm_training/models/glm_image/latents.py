"""Between images, VAE latents and prior tokens: the conventions GLM-Image was trained with.

B images of H x W px, latents [C, h, w].
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor


def upsample_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Prior tokens ``[B, rows * columns]`` (32 px each) to DiT patches (16 px), nearest: ``[B, 4 * that]``."""
    rows, columns = grid
    planes = tokens.view(-1, rows, columns)
    return planes.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


def check_vae(vae: AutoencoderKL) -> None:
    """Raise ValueError when the VAE lacks the statistics GLM-Image's latents are normalised with."""
    channels = vae.config["latent_channels"]
    for name in ("latents_mean", "latents_std"):
        values = vae.config[name]
        if values is None or len(values) != channels:
            raise ValueError(
                f"vae/config.json: {name} must list {channels} numbers, one per latent channel, got {values}; "
                "GLM-Image normalises latents with them (scaling_factor is not used)"
            )


def _statistics(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(vae.config[name], dtype=torch.float32, device=device).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return mean, std


def encode_images(vae: AutoencoderKL, images: Tensor, micro_batch_size: int) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1] to normalised latents ``[B, C, H/8, W/8]`` fp32, without gradient.

    The mode of the posterior, minus `latents_mean`, over `latents_std`. Runs in the VAE's own dtype even under
    autocast. Raises ValueError for a wrong shape or values outside [0, 1].
    """
    _check_micro_batch(micro_batch_size)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (-1e-3 <= low and high <= 1 + 1e-3):
        raise ValueError(f"images must have values in [0, 1], got [{low:g}, {high:g}]")
    weight = vae.encoder.conv_in.weight
    images = images.to(weight.device)
    mean, std = _statistics(vae, images.device)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        signed = (images * 2 - 1).to(weight.dtype)
        parts = [vae.encode(part).latent_dist.mode().float() for part in signed.split(micro_batch_size)]
    return (torch.cat(parts) - mean) / std


def decode_latents(vae: AutoencoderKL, latents: Tensor, micro_batch_size: int) -> Tensor:
    """Normalised latents ``[B, C, h, w]`` to images ``[B, 3, 8h, 8w]`` fp32 in [0, 1].

    Differentiable when `latents` carry a gradient (clamped pixels pass none). Runs in the VAE's own dtype even under
    autocast. Raises FloatingPointError when a pixel is not finite.
    """
    _check_micro_batch(micro_batch_size)
    weight = vae.decoder.conv_in.weight
    latents = latents.to(weight.device)
    mean, std = _statistics(vae, latents.device)
    with torch.autocast(latents.device.type, enabled=False):
        raw = (latents.float() * std + mean).to(weight.dtype)
        if raw.device.type == "cpu":
            raw = raw.contiguous(memory_format=torch.channels_last)  # its convolutions are quickest so
        parts = [vae.decode(part, return_dict=False)[0].float() for part in raw.split(micro_batch_size)]
    images = torch.cat(parts).contiguous()
    if not bool(torch.isfinite(images).all()):
        raise FloatingPointError("the VAE decodes to NaN or infinite pixels: in float16 it overflows; use bfloat16")
    return (images / 2 + 0.5).clamp(0, 1)


def _check_micro_batch(micro_batch_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
