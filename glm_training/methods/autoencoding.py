"""What VGT's autoencoder learns from: pixels, perception, its teacher's features, and a discriminator.

B images [B, 3, H, W] in [0, 1], fp32 whatever the networks compute in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm_training.algorithms.adversarial import hinge_discriminator_loss, hinge_generator_loss, lecam_penalty
from glm_training.methods.losses import MethodLoss
from glm_training.models.vgt.autoencoder import Posterior, Reconstruction

Distance = Callable[[Tensor, Tensor], Tensor]
"""(images, others) in [0, 1] -> distances [B], as `models.perceptual.LpipsVgg`."""

Logits = Callable[[Tensor], Tensor]
"""images in [0, 1] -> logits: [B, classes] of `models.perceptual.ConvNextLogits`, or a discriminator's."""


@dataclass(frozen=True)
class AutoencodingWeights:
    """How much each term counts; the defaults are those of the published stage 1. Stage 2 has `distillation` 0.1.

    `lpips` and `classes` share `perceptual` between them: perceptual * (lpips * LPIPS + classes * MSE of the logits) /
    (lpips + classes), so that with the published numbers LPIPS counts 1 and the logits 0.1.
    """

    reconstruction: float = 1.0
    perceptual: float = 1.1
    lpips: float = 1.0
    classes: float = 0.1
    distillation: float = 1.0
    kl: float = 1e-6
    adversarial: float = 0.1
    lecam: float = 1e-3


@dataclass(frozen=True)
class Autoencoding:
    """The losses of both players. `lpips` and `classes` are the perceptual networks; None leaves a term out, and the
    other has the whole weight then."""

    weights: AutoencodingWeights
    lpips: Distance | None = None
    classes: Logits | None = None

    def loss(
        self,
        output: Reconstruction,
        images: Tensor,
        *,
        teacher_features: Tensor | None = None,
        discriminator: nn.Module | None = None,
    ) -> MethodLoss:
        """The autoencoder's loss on its reconstruction of `images`.

        teacher_features: [B, L, D], for distillation. discriminator: from its start on; it learns nothing here. Metrics
        are the terms before their weights, those that count: `mse`, `lpips`, `classes` (squared difference of logits),
        `distillation`, `kl` (nats per image), `adversarial`.
        """
        weights, images = self.weights, images.float()
        with torch.autocast(images.device.type, enabled=False):
            terms = {"mse": (output.images - images).square().mean()}
            total = weights.reconstruction * terms["mse"]
            perceptual = self._perceptual(output.images, images)
            if perceptual:
                shares = {"lpips": weights.lpips, "classes": weights.classes}
                shared = sum(shares[name] for name in perceptual)
                for name, term in perceptual.items():
                    total = total + weights.perceptual * shares[name] / shared * term
            terms |= perceptual
            if teacher_features is not None:
                terms["distillation"] = (output.features.float() - teacher_features.float()).square().mean()
                total = total + weights.distillation * terms["distillation"]
            if output.posterior is not None:
                terms["kl"] = gaussian_kl(output.posterior).mean()
                total = total + weights.kl * terms["kl"]
            if discriminator is not None:
                with _unchanged(discriminator):
                    logits = discriminator(output.images)
                terms["adversarial"] = hinge_generator_loss(logits, check_finite=False)
                total = total + weights.adversarial * terms["adversarial"]
        return MethodLoss(total, len(images), {name: term.detach() for name, term in terms.items()})

    def discriminator_loss(
        self,
        discriminator: Logits,
        reconstructions: Tensor,
        images: Tensor,
        averages: Tensor,
        *,
        step_means: Callable[[Tensor], Tensor] = lambda means: means,
    ) -> MethodLoss:
        """The discriminator's loss; no gradient reaches `reconstructions`.

        averages: [2], LeCam's moving averages of real and fake logits, which the caller moves on once per step
        (`algorithms.adversarial.update_averages`) by the metrics `real_logits` and `fake_logits`. step_means: makes the
        means [2] of the whole step out of those of this batch, where a step has several processes or batches: the
        penalty is a square of them, so the mean of squares over parts would be another loss. Other metrics: `hinge` and
        `lecam` before its weight.
        """
        with torch.autocast(images.device.type, enabled=False):
            real = discriminator(images.float())
            fake = discriminator(reconstructions.detach().float())
            hinge = hinge_discriminator_loss(real, fake, check_finite=False)
            own = torch.stack([real.float().mean(), fake.float().mean()])
            means = step_means(own.detach())
            # the value of the whole step, the gradient of this part
            real_mean, fake_mean = means + (own - own.detach())
            lecam = lecam_penalty(real_mean, fake_mean, averages, check_finite=False)
        metrics = {"hinge": hinge, "lecam": lecam, "real_logits": means[0], "fake_logits": means[1]}
        told = {name: figure.detach() for name, figure in metrics.items()}
        return MethodLoss(hinge + self.weights.lecam * lecam, len(images), told)

    def _perceptual(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.lpips is not None:
            terms["lpips"] = self.lpips(images, targets).mean()
        if self.classes is not None:
            with torch.no_grad():
                wanted = self.classes(targets)
            terms["classes"] = (self.classes(images) - wanted).square().mean()
        return terms


def gaussian_kl(posterior: Posterior) -> Tensor:
    """[B]: KL(N(mean, variance) || N(0, 1)) in nats, summed over the latents of each image (arXiv:1312.6114)."""
    mean, log_variance = posterior.mean, posterior.log_variance
    return (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2


@contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """No gradient into the weights of `network`; its input gets one."""
    trained = [param for param in network.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)
