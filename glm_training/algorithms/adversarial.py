"""The game of an autoencoder with a discriminator: hinge losses, and LeCam's penalty for few data (arXiv:2104.03310).

Logits are of any shape, above 0 for what looks real.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm_training.algorithms._tensors import demand, finite


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, check_finite: bool = True) -> Tensor:
    """0-dim (mean relu(1 - real) + mean relu(1 + fake)) / 2, fp32.

    No gradient from logits that are right by 1 or more. Raises ValueError for empty and (one device synchronisation,
    skipped with check_finite=False) non-finite logits.
    """
    _require_logits(check_finite, real_logits=real_logits, fake_logits=fake_logits)
    return (torch.relu(1 - real_logits.float()).mean() + torch.relu(1 + fake_logits.float()).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor, *, check_finite: bool = True) -> Tensor:
    """0-dim -mean(fake), fp32: linear, so that what is far from real is pulled as hard as what is near. Raises as
    `hinge_discriminator_loss`."""
    _require_logits(check_finite, fake_logits=fake_logits)
    return -fake_logits.float().mean()


def lecam_penalty(real_mean: Tensor, fake_mean: Tensor, averages: Tensor, *, check_finite: bool = True) -> Tensor:
    """0-dim relu(real - average fake)^2 + relu(average real - fake)^2, fp32: keeps the two kinds of logits near each
    other, whose distance grows where a discriminator knows its data by heart.

    `real_mean`, `fake_mean`: 0-dim means of the batch's logits, with gradient; `averages` [2]: those of the steps
    before (`update_averages`), real first. Raises ValueError for shapes and non-finite values, as above.
    """
    if real_mean.ndim or fake_mean.ndim or averages.shape != (2,):
        raise ValueError(
            "real_mean and fake_mean must be 0-dim and averages of shape [2], got "
            f"{[list(tensor.shape) for tensor in (real_mean, fake_mean, averages)]}"
        )
    if check_finite:
        demand(finite("real_mean", real_mean), finite("fake_mean", fake_mean), finite("averages", averages))
    average_real, average_fake = averages.detach().float()
    return torch.relu(real_mean.float() - average_fake) ** 2 + torch.relu(average_real - fake_mean.float()) ** 2


@torch.no_grad()
def update_averages(averages: Tensor, real_mean: Tensor, fake_mean: Tensor, decay: float = 0.999) -> Tensor:
    """[2]: decay * averages + (1 - decay) * (real_mean, fake_mean), fp32; from zeros at the start, as published.

    Raises ValueError for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    means = torch.stack([real_mean, fake_mean]).float()
    return averages.float().lerp(means, 1 - decay)


def _require_logits(check_finite: bool, **logits: Tensor) -> None:
    for name, tensor in logits.items():
        if not tensor.numel():
            raise ValueError(f"{name} must not be empty, got {list(tensor.shape)}")
    if check_finite:
        demand(*(finite(name, tensor) for name, tensor in logits.items()))
