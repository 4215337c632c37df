"""Direct group preference optimization (DGPO, arXiv:2510.08425): a group's good samples are preferred to its bad ones.

Diffusion-DPO with groups in the place of pairs: no likelihood, no trajectory, any sampler. The samples with a positive
advantage are one side and those with a negative one the other, each weighing as much as its advantage says; since the
advantages of a group sum to zero, what cannot be known of a diffusion model's likelihood cancels between the sides.

B samples, in groups of G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm_training.algorithms._tensors import demand, finite, require_ndim, require_positive, require_same_shape


@dataclass(frozen=True)
class GroupPreferenceLoss:
    """`loss` carries the gradient; the rest is detached, fp32.

    margins [B]: of each sample's group, what the sigmoid is taken of, 0 while policy and reference agree.
    clip_fraction: share of the samples whose gradient the clip took.
    """

    loss: Tensor
    margins: Tensor
    clip_fraction: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of the samples in whose group the policy prefers the good side more than the reference does; one half
        where they agree."""
        return ((self.margins > 0).float() + 0.5 * (self.margins == 0).float()).mean()


def group_preference_loss(
    errors: Tensor,
    reference_errors: Tensor,
    advantages: Tensor,
    groups: Tensor,
    *,
    beta: float,
    old_errors: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    check_finite: bool = True,
) -> GroupPreferenceLoss:
    """-mean over the samples of log sigmoid(m) / beta, m = -beta / G sum over the group of A (e - e_ref).

    All [B]: `errors` e and `reference_errors` are mean squared prediction errors at one noise and level; `groups` tells
    by equal integers which samples are compared. With G+ and G- the sides of A > 0 and A < 0 the sum is that of |A|
    over G+ minus that over G-. The slope in e is A sigmoid(-m) / B: A / (2 B) while policy and reference agree, where
    the loss is ln 2 / beta. The division by beta keeps the size of the gradient, and with it what a KL beside it
    weighs, whatever beta is; the published code has the same slope.

    `clip` (low, high) with `old_errors`, those of the policy that drew: a sample with A > 0 and exp(e_old - e) >
    1 + high, or with A < 0 and exp(e_old - e) < 1 - low, has no gradient, and counts in m as before. Raises ValueError
    for shapes, beta <= 0, a clip without old errors, and (one device synchronisation, skipped with check_finite=False)
    non-finite input.
    """
    require_positive("beta", beta)
    require_ndim("errors", errors, 1, "[B]")
    named = {"reference_errors": reference_errors, "advantages": advantages, "groups": groups}
    if old_errors is not None:
        named["old_errors"] = old_errors
    for name, tensor in named.items():
        require_same_shape(name, tensor, "errors", errors)
    if clip is not None and old_errors is None:
        raise ValueError("old_errors are needed for a clip")
    if check_finite:
        demand(*(finite(name, tensor) for name, tensor in {"errors": errors, **named}.items()))
    errors, advantages = errors.float(), advantages.detach().float()
    clipped = torch.zeros_like(advantages, dtype=torch.bool)
    if clip is not None and old_errors is not None:
        ratio = (old_errors.float() - errors).detach().exp()
        clipped = ((advantages > 0) & (ratio > 1 + clip[1])) | ((advantages < 0) & (ratio < 1 - clip[0]))
    kept = torch.where(clipped, errors.detach(), errors)
    member = (groups.unsqueeze(1) == groups).float()
    terms = advantages * (kept - reference_errors.detach().float())
    margins = -beta * (member * terms).sum(dim=1) / member.sum(dim=1)
    # each sample carries its group's loss: a mean over samples weighs groups by their size
    loss = -F.logsigmoid(margins).mean() / beta
    return GroupPreferenceLoss(loss, margins.detach(), clipped.float().mean())
