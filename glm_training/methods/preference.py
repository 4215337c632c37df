"""Learning from preferences: Diffusion-DPO for what denoises, DPO on sequences for the AR half, and plain finetuning.

Rows come in pairs: B preferred images, then the B rejected ones of the same prompts. Both of a pair are noised with the
same noise to the same level and go through the network in one forward pass, so that nothing but the images differs.
Latents are [C, h, w], sequences of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm_training.algorithms.preference import (
    PreferenceLoss,
    diffusion_dpo_loss,
    min_snr_weights,
    sequence_dpo_loss,
)
from glm_training.methods.ar_policy_gradient import ScoreTokens
from glm_training.methods.losses import Context, MethodLoss
from glm_training.models.denoising import Denoiser, Levels, Network
from glm_training.models.glm_image.ar_types import ARPrompt


@dataclass(frozen=True)
class Policies:
    """What denoises, in its two roles. `trained` is `component`, perhaps inside DDP; `reference` makes a context in
    which `component` is the reference: adapters off, or the starting weights in place."""

    trained: Network
    component: Network
    reference: Context


@dataclass(frozen=True)
class DiffusionPreference:
    """Diffusion-DPO (arXiv:2311.12908): the trained network should have gained more on the preferred image than on the
    rejected one, against its reference, measured by the squared error of its prediction.

    `min_snr_gamma` weights the pairs by min-SNR (epsilon and v predictions); None weights all levels alike.
    """

    denoiser: Denoiser
    beta: float
    min_snr_gamma: float | None = None

    def loss(self, policies: Policies, clean: Tensor, condition: Any, *, noise: Tensor, levels: Levels) -> MethodLoss:
        """`clean` [2B, C, h, w] and `condition` (2B rows): preferred, then rejected; `noise` [B, C, h, w], `levels` (B)
        of the pairs.

        The reference goes first: no activations of the trained network are held while it runs. Metrics: `accuracy`,
        `margin` (`algorithms.preference`), mean errors of both images, and by how much each differs from the
        reference's: a preferred image may be chosen because the other got worse.
        """
        with policies.reference(), torch.no_grad():
            reference = errors(self.denoiser, policies.component, clean, condition, noise=noise, levels=levels)
        trained = errors(self.denoiser, policies.trained, clean, condition, noise=noise, levels=levels)
        (chosen, rejected), (chosen_before, rejected_before) = trained.chunk(2), reference.chunk(2)
        found = diffusion_dpo_loss(
            chosen,
            rejected,
            chosen_before,
            rejected_before,
            beta=self.beta,
            weights=level_weights(self.denoiser, levels, self.min_snr_gamma, clean.device),
            check_finite=False,  # the gradient norm tells, without waiting for the device here
        )
        return _told(found, trained.detach(), trained.detach() - reference)


@dataclass(frozen=True)
class DiffusionFinetuning:
    """Mean squared error of the prediction on the preferred images alone, without a reference."""

    denoiser: Denoiser
    min_snr_gamma: float | None = None

    def loss(self, policy: Network, clean: Tensor, condition: Any, *, noise: Tensor, levels: Levels) -> MethodLoss:
        """`clean`, `noise` [B, C, h, w], `condition` and `levels` of B rows."""
        found = errors(self.denoiser, policy, clean, condition, noise=noise, levels=levels)
        weights = level_weights(self.denoiser, levels, self.min_snr_gamma, clean.device)
        weighted = found if weights is None else found * weights
        each = {"loss": weighted.detach(), "chosen_error": found.detach()}
        return MethodLoss(weighted.mean(), len(clean), {"chosen_error": found.detach().mean()}, each)


@dataclass(frozen=True)
class SequencePreference:
    """DPO (arXiv:2305.18290) on the tokens of both images, log-probs summed over all of them."""

    beta: float

    def loss(self, policy: ScoreTokens, prompt: ARPrompt, tokens: Tensor, reference: Tensor) -> MethodLoss:
        """`prompt` (2B rows), `tokens` [2B, T]: preferred, then rejected; `reference` [2B] from `sequence_log_probs`.

        Metrics as in `DiffusionPreference`, the errors being nats per token.
        """
        trained, length = policy(prompt, tokens).sum(1), tokens.shape[1]
        reference = reference.to(trained.device)
        (chosen, rejected), (chosen_before, rejected_before) = trained.chunk(2), reference.chunk(2)
        found = sequence_dpo_loss(chosen, rejected, chosen_before, rejected_before, beta=self.beta, check_finite=False)
        per_token = -trained.detach() / length
        return _told(found, per_token, per_token + reference / length)


def _told(found: PreferenceLoss, errors: Tensor, changes: Tensor) -> MethodLoss:
    """The term of B pairs; `errors` and their `changes` against the reference: [2B], preferred, then rejected."""
    (chosen, rejected), (chosen_change, rejected_change) = errors.chunk(2), changes.chunk(2)
    each = {
        "accuracy": found.accuracies,
        "margin": found.margins,
        "chosen_error": chosen,
        "rejected_error": rejected,
        "chosen_change": chosen_change,
        "rejected_change": rejected_change,
    }
    means = {name: values.mean() for name, values in each.items()}
    return MethodLoss(found.loss, len(found.margins), means, {"loss": found.losses, **each})


@torch.no_grad()
def sequence_log_probs(component: ScoreTokens, prompt: ARPrompt, tokens: Tensor) -> Tensor:
    """Log-probs [rows] fp32, in nats, of whole token sequences [rows, T]: a reference, without gradient."""
    return component(prompt, tokens).sum(1)


def errors(
    denoiser: Denoiser, network: Network, clean: Tensor, condition: Any, *, noise: Tensor, levels: Levels
) -> Tensor:
    """Mean squared prediction errors [rows] fp32 of `clean` [rows, C, h, w].

    `noise` and `levels` have as many rows, or half as many: then row i and row i + rows / 2 share theirs. Raises
    ValueError for other counts.
    """
    copies, rest = divmod(len(clean), len(noise))
    if rest or copies not in (1, 2) or len(levels) != len(noise):
        raise ValueError(f"{len(noise)} noises at {len(levels)} levels do not serve {len(clean)} images in pairs")
    if copies == 2:
        noise = torch.cat([noise, noise])
        levels = levels.select(torch.arange(len(levels), device=levels.timestep.device).repeat(2))
    noisy = denoiser.noised(clean, noise, levels)
    prediction = denoiser.predict(network, noisy, levels, condition)
    return (prediction - denoiser.target(clean, noise, levels)).square().flatten(1).mean(1)


def level_weights(denoiser: Denoiser, levels: Levels, gamma: float | None, device: torch.device) -> Tensor | None:
    """Min-SNR weights [B] of the levels on `device`; None for no weighting."""
    if gamma is None:
        return None
    return min_snr_weights(levels.snr(), gamma=gamma, prediction=denoiser.prediction, check_finite=False).to(device)
