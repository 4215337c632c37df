"""Few-step distillation by distribution matching (DMD2, arXiv:2405.14867), with DMDR's two dynamic strategies.

The generator makes x0 in few steps. The guidance network is the frozen teacher with an adapter: at one strength of the
adapter it is the fake score, which learns the generator's distribution, at another one the real score.

B samples with latents [C, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from glm_training.algorithms.distillation import distribution_matching_loss, guidance_scale_decay, renoise_beta
from glm_training.methods.losses import MethodLoss
from glm_training.models.denoising import Denoiser, Levels, Network
from glm_training.models.lora import adapters_scaled


class BackwardSimulation:
    """The generator's own sampler of `steps` steps, run without gradient up to a step of each row's own.

    In training the generator so meets what it meets when it draws, and no real image is needed. Conditions are of B
    rows and have `select(rows)`. Raises ValueError for steps that the denoiser does not take.
    """

    def __init__(self, denoiser: Denoiser, steps: int) -> None:
        self.denoiser = denoiser
        self.steps = steps
        self._levels = denoiser.sampling_levels(steps)

    @property
    def draws(self) -> int:
        """Noises per row that `inputs` takes: one per step where the sampler renoises, else the first one alone."""
        return self.steps if self.denoiser.renoises else 1

    def picks(self, draws: Tensor) -> Tensor:
        """The steps [B] (long, in [0, steps)) that uniform `draws` [B] in [0, 1) fall on."""
        return (draws * self.steps).long().clamp(max=self.steps - 1)

    def levels(self, picks: Tensor) -> Levels:
        """The noise levels of the steps `picks` [B], on the CPU."""
        return self._levels.select(picks.cpu())

    @torch.no_grad()
    def inputs(self, network: Network, noise: Tensor, picks: Tensor, condition: Any) -> Tensor:
        """What the generator `network` is given at step `picks` [B] of its sampler, fp32 [B, C, h, w].

        `noise` [B, draws, C, h, w], standard normal: the first is the start, unscaled, the others are put on the
        estimates in between. A row takes as many passes as its step has before it.
        """
        noisy = noise[:, 0].float().clone()  # written to below, and the noise is the caller's
        for step in range(int(picks.max())):
            rows = (picks > step).nonzero().squeeze(1).to(noise.device)
            here, after = (self.levels(torch.full((len(rows),), at)) for at in (step, step + 1))
            fresh = noise[rows, step + 1 if self.denoiser.renoises else 0]
            prediction = self.denoiser.predict(network, noisy[rows], here, condition.select(rows))
            clean = self.denoiser.clean(prediction, noisy[rows], here)
            noisy[rows] = self.denoiser.step(clean, noisy[rows], here, after, fresh)
        return noisy

    def generate(self, network: Network, inputs: Tensor, picks: Tensor, condition: Any) -> Tensor:
        """The generator's x0 from `inputs` at the steps `picks`, fp32 [B, C, h, w], with gradient where it is on."""
        levels = self.levels(picks)
        return self.denoiser.clean(self.denoiser.predict(network, inputs, levels, condition), inputs, levels)


@dataclass(frozen=True)
class Scores:
    """Real and fake score of one network: `network` is its forward outside DDP, `module` what carries the adapter.

    `fake_scale`: strength of the adapter in the fake score. `guidance_scale`: classifier-free guidance of the real one.
    """

    denoiser: Denoiser
    network: Network
    module: nn.Module
    fake_scale: float
    guidance_scale: float

    @torch.no_grad()
    def real(self, noisy: Tensor, levels: Levels, condition: Any, scale: float) -> Tensor:
        """The x0 that the teacher, its adapter at strength `scale`, sees in `noisy`: fp32 [B, C, h, w]."""
        with adapters_scaled(self.module, scale):
            prediction = self.denoiser.predict(
                self.network, noisy, levels, condition, guidance_scale=self.guidance_scale
            )
        return self.denoiser.clean(prediction, noisy, levels)

    @torch.no_grad()
    def fake(self, noisy: Tensor, levels: Levels, condition: Any) -> Tensor:
        """The x0 that the fake score sees in `noisy`: fp32 [B, C, h, w]."""
        with adapters_scaled(self.module, self.fake_scale):
            prediction = self.denoiser.predict(self.network, noisy, levels, condition)
        return self.denoiser.clean(prediction, noisy, levels)


def fake_score_loss(
    denoiser: Denoiser, network: Network, generated: Tensor, condition: Any, *, noise: Tensor, u: Tensor
) -> MethodLoss:
    """The denoising error of the fake score on the generator's x0 `generated` [B, C, h, w], taken without gradient.

    `noise` [B, C, h, w], `u` [B] in [0, 1]: the noise level. The caller keeps the adapter at `Scores.fake_scale` until
    after the backward pass (`adapters_scaled`); `network` is the guidance network, perhaps inside DDP.
    """
    clean, levels = generated.detach(), denoiser.levels(u)
    prediction = denoiser.predict(network, denoiser.noised(clean, noise, levels), levels, condition)
    loss = (prediction - denoiser.target(clean, noise, levels)).square().mean()
    return MethodLoss(loss, len(clean), {"fake_loss": loss.detach()})


def generator_loss(
    scores: Scores, generated: Tensor, condition: Any, *, noise: Tensor, u: Tensor, real_scale: float
) -> MethodLoss:
    """Distribution matching of the generator's x0 `generated` [B, C, h, w], whose gradient it is.

    Renoised with `noise` [B, C, h, w] at level `u` [B] in [0, 1], it is seen by the real score, its adapter at
    `real_scale`, and by the fake one. The figure `score_gap` is mean |x0_real - x0_fake|.
    """
    denoiser = scores.denoiser
    levels = denoiser.levels(u)
    noisy = denoiser.noised(generated.detach(), noise, levels)
    real, fake = scores.real(noisy, levels, condition, real_scale), scores.fake(noisy, levels, condition)
    loss = distribution_matching_loss(generated, real, fake)
    return MethodLoss(loss, len(generated), {"dmd_loss": loss.detach(), "score_gap": (real - fake).abs().mean()})


@dataclass(frozen=True)
class Dynamics:
    """DynaDG and DynaRS: how the strength of the adapter in the real score and the noise levels move in training.

    `guidance_steps`, `renoise_steps`: the training steps over which they do; None switches one off: strength 0, uniform
    levels. `start`: the strength at first. `low`, `high`: the noise levels that are drawn, of [0, 1].
    """

    start: float
    guidance_steps: int | None
    renoise_steps: int | None
    low: float
    high: float

    def real_scale(self, step: int) -> float:
        """Strength of the adapter in the real score at training step `step`, from 0."""
        return 0.0 if self.guidance_steps is None else guidance_scale_decay(step, self.guidance_steps, self.start)

    def levels(self, draws: Tensor, step: int) -> Tensor:
        """Noise levels u [B] fp32 in [low, high] from uniform `draws` [B]: their quantiles of the Beta distribution.

        Two runs that draw the same numbers so get the same levels, however many processes share the work.
        """
        alpha, beta = (1.0, 1.0) if self.renoise_steps is None else renoise_beta(step, self.renoise_steps)
        # fp64, on the CPU: every device gets the same levels
        quantiles = torch.from_numpy(betaincinv(alpha, beta, draws.double().cpu().numpy()))
        return (self.low + (self.high - self.low) * quantiles).float().to(draws.device)
