"""Between images and SDXL's latents: the VAE both ways, and TAESD, the small decoder that rewards can look through.

B images of H x W px, latents [C, h, w].
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor


def without_overflow(vae: AutoencoderKL) -> AutoencoderKL:
    """`vae` itself, in fp32 where it is in fp16 and its config says that fp16 overflows (SDXL's own does)."""
    if vae.dtype == torch.float16 and vae.config["force_upcast"]:
        torch.nn.Module.to(vae, torch.float32)
    return vae


def encode_images(vae: AutoencoderKL, images: Tensor, micro_batch_size: int, noise: Tensor | None = None) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1] to scaled latents ``[B, C, H/8, W/8]`` fp32, without gradient.

    The mode of the posterior, or with `noise` ``[B, C, H/8, W/8]`` (standard normal) the sample it makes. At most
    `micro_batch_size` images pass the VAE at once. Runs in the VAE's own dtype even under autocast. Raises ValueError
    for a wrong shape or values outside [0, 1], FloatingPointError when a latent is not finite.
    """
    _check_micro_batch(micro_batch_size)
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (-1e-3 <= low and high <= 1 + 1e-3):
        raise ValueError(f"images must have values in [0, 1], got [{low:g}, {high:g}]")
    weight = vae.encoder.conv_in.weight
    noises: tuple[Tensor | None, ...] = (None,) * len(images)
    if noise is not None:
        noises = noise.to(weight.device, torch.float32).split(micro_batch_size)
    parts = []
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for part, drawn in zip(images.split(micro_batch_size), noises, strict=False):
            signed = (part.to(weight.device) * 2 - 1).to(weight.dtype)
            posterior = vae.encode(signed).latent_dist
            mean = posterior.mean.float()
            parts.append(mean if drawn is None else mean + posterior.std.float() * drawn)
    mean, std = _statistics(vae, weight.device)
    latents = (torch.cat(parts) - mean) / std
    if not bool(torch.isfinite(latents).all()):
        raise FloatingPointError("the VAE encodes to NaN or infinite latents: in float16 it overflows; use float32")
    return latents


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor, micro_batch_size: int) -> Tensor:
    """Scaled latents ``[B, C, h, w]`` to images ``[B, 3, 8h, 8w]`` fp32 in [0, 1].

    Differentiable when `latents` carry a gradient (clamped pixels pass none). Runs in the decoder's own dtype even
    under autocast. Raises FloatingPointError when a pixel is not finite.
    """
    _check_micro_batch(micro_batch_size)
    weight = next(vae.decoder.parameters())
    latents = latents.to(weight.device)
    mean, std = _statistics(vae, weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        raw = (latents.float() * std + mean).to(weight.dtype)
        parts = [vae.decode(part, return_dict=False)[0].float() for part in raw.split(micro_batch_size)]
    images = torch.cat(parts)
    if not bool(torch.isfinite(images.detach()).all()):
        raise FloatingPointError("the VAE decodes to NaN or infinite pixels: in float16 it overflows; use float32")
    return (images / 2 + 0.5).clamp(0, 1)


def _statistics(vae: AutoencoderKL | AutoencoderTiny, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and scale of the latents, z = x * scale + shift: 0 and 1 / scaling_factor, or as the config lists them."""
    scale = 1 / vae.config["scaling_factor"]
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return torch.zeros((), device=device), torch.full((), scale, device=device)
    shift, spread = (torch.tensor(x, dtype=torch.float32, device=device).view(1, -1, 1, 1) for x in (mean, std))
    return shift, spread * scale


def _check_micro_batch(micro_batch_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
