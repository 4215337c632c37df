"""Direct preference optimization: a policy is moved from its reference towards the preferred of two samples.

Whatever stands for a sample's log-likelihood gives the same loss: minus the prediction error of a diffusion model
(Diffusion-DPO, arXiv:2311.12908), or the summed log-probs of a sequence (DPO, arXiv:2305.18290). B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from glm_training.algorithms._tensors import (
    ValueCheck,
    demand,
    finite,
    require_choice,
    require_ndim,
    require_positive,
    require_same_shape,
)


@dataclass(frozen=True)
class PreferenceLoss:
    """`loss` carries the gradient; `margins` [B] fp32, detached: what the sigmoid is taken of, 0 while policy and
    reference agree on a pair."""

    loss: Tensor
    margins: Tensor

    @property
    def losses(self) -> Tensor:
        """The loss of each pair [B], detached."""
        return -F.logsigmoid(self.margins)

    @property
    def accuracies(self) -> Tensor:
        """[B]: 1 where the policy prefers the chosen sample more than the reference does, 0 where less, and one half
        while they agree, which is no preference."""
        return (self.margins > 0).float() + 0.5 * (self.margins == 0).float()

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs in which the policy prefers the chosen sample; one half at the start."""
        return self.accuracies.mean()

    @property
    def margin(self) -> Tensor:
        """Mean of the margins."""
        return self.margins.mean()


def diffusion_dpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    reference_chosen_error: Tensor,
    reference_rejected_error: Tensor,
    *,
    beta: float,
    weights: Tensor | None = None,
    check_finite: bool = True,
) -> PreferenceLoss:
    """-mean log sigmoid(m), m = -beta / 2 * [(e_c - e_r) - (e_c^ref - e_r^ref)] (Diffusion-DPO, arXiv:2311.12908).

    All errors [B] are mean squared prediction errors, those of a pair at the same noise and timestep. `weights` [B],
    >= 0 (`min_snr_weights`, say) multiply the bracket. At policy = reference the loss is ln 2 exactly, and its slope is
    beta / (4 B) in e_c and -beta / (4 B) in e_r. Gradient flows into `chosen_error` and `rejected_error`. Raises
    ValueError for shapes, beta <= 0, and (one device synchronisation, skipped with check_finite=False) non-finite input
    or negative weights.
    """
    require_positive("beta", beta)
    errors = {
        "chosen_error": chosen_error,
        "rejected_error": rejected_error,
        "reference_chosen_error": reference_chosen_error,
        "reference_rejected_error": reference_rejected_error,
    }
    if weights is not None:
        require_same_shape("weights", weights, "chosen_error", chosen_error)
    difference = _policy_minus_reference(errors, weights, check_finite)
    if weights is not None:
        difference = difference * weights.detach().float()
    return _logistic(-beta / 2 * difference)


def sequence_dpo_loss(
    chosen_log_prob: Tensor,
    rejected_log_prob: Tensor,
    reference_chosen_log_prob: Tensor,
    reference_rejected_log_prob: Tensor,
    *,
    beta: float,
    check_finite: bool = True,
) -> PreferenceLoss:
    """-mean log sigmoid(m), m = beta * [(l_c - l_r) - (l_c^ref - l_r^ref)] (DPO, arXiv:2305.18290).

    All [B]: log-probs of whole sequences in nats, sums over their tokens. Gradient flows into the policy's two. Raises
    ValueError as `diffusion_dpo_loss` does.
    """
    require_positive("beta", beta)
    log_probs = {
        "chosen_log_prob": chosen_log_prob,
        "rejected_log_prob": rejected_log_prob,
        "reference_chosen_log_prob": reference_chosen_log_prob,
        "reference_rejected_log_prob": reference_rejected_log_prob,
    }
    return _logistic(beta * _policy_minus_reference(log_probs, None, check_finite))


def min_snr_weights(snr: Tensor, *, gamma: float, prediction: str, check_finite: bool = True) -> Tensor:
    """Min-SNR loss weights [B] fp32 (arXiv:2303.09556) at signal-to-noise ratios `snr` [B] >= 0.

    min(snr, gamma) / snr, 1 at snr 0, where the network predicts the noise ("epsilon"); min(snr, gamma) / (snr + 1)
    where it predicts v ("v_prediction"). Raises ValueError for another prediction, gamma <= 0, a wrong shape, and (one
    device synchronisation, skipped with check_finite=False) a ratio that is negative or not finite.
    """
    require_ndim("snr", snr, 1, "[B]")
    require_positive("gamma", gamma)
    require_choice("prediction", prediction, ("epsilon", "v_prediction"))
    snr = snr.detach().float()
    if check_finite:
        demand(finite("snr", snr), _not_negative("snr", snr))
    if prediction == "epsilon":
        # not min(snr, gamma) / snr, which is 0 / 0 where all is noise
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)


def _policy_minus_reference(named: dict[str, Tensor], weights: Tensor | None, check_finite: bool) -> Tensor:
    """(chosen - rejected) - (reference chosen - reference rejected), fp32 [B], of four tensors in that order."""
    (first, chosen), *others = named.items()
    require_ndim(first, chosen, 1, "[B]")
    for name, tensor in others:
        require_same_shape(name, tensor, first, chosen)
    if check_finite:
        checks = [finite(name, tensor) for name, tensor in named.items()]
        if weights is not None:
            checks += [finite("weights", weights), _not_negative("weights", weights)]
        demand(*checks)
    # fp32 before the differences: errors of the two models agree in all the digits that bf16 has
    rejected, reference_chosen, reference_rejected = (tensor.float() for _, tensor in others)
    return (chosen.float() - rejected) - (reference_chosen - reference_rejected).detach()


def _not_negative(name: str, tensor: Tensor) -> ValueCheck:
    return ValueCheck((tensor.detach() >= 0).all(), f"{name} must be >= 0")


def _logistic(margin: Tensor) -> PreferenceLoss:
    # logsigmoid, not log(sigmoid): at beta 5000 a sigmoid underflows to 0 long before its logarithm matters
    return PreferenceLoss(-F.logsigmoid(margin).mean(), margin.detach())
