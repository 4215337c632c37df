"""Stage 1a: the VAE, by reconstruction (L1 + a light KL), then its latent statistics."""

from __future__ import annotations

import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from world import SIZE

from data import pictures

CROP = 64


def train_vae(vae: AutoencoderKL, *, steps: int, batch_size: int, seed: int, log) -> None:
    """Trains `vae` in place; images are seen in [-1, 1]. Sets `latents_mean` and `latents_std` of its config."""
    images = pictures(8000, seed).images
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    started = time.time()
    for step in range(steps):
        # Crops are four times as cheap; the last steps see whole pictures, as the group norms will.
        whole = step >= 0.75 * steps
        rows = torch.randint(len(images), (batch_size if whole else 2 * batch_size,), generator=generator)
        x = images[rows]
        if not whole:
            top, left = torch.randint(SIZE - CROP + 1, (2,), generator=generator).tolist()
            x = x[:, :, top : top + CROP, left : left + CROP]
        x = to_model_range(x).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = vae.decode(latents).sample
        error = (reconstruction.float() - x).abs()
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = error.mean() + 4.0 * (error**2).mean() + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"vae step {step} l1 {error.mean():.4f} kl {kl:.2f} {time.time() - started:.0f}s")
    vae.eval()
    set_latent_statistics(vae, images[:1000])


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Per-channel mean and standard deviation of the latents, written to the config as GLM-Image keeps them."""
    latents = torch.cat([vae.encode(to_model_range(chunk)).latent_dist.mode() for chunk in images.split(50)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def to_model_range(images: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return images.float() / 127.5 - 1.0
