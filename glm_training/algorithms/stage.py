"""STAGE (arXiv:2509.25027): advantages of image tokens by how unlike the tokens of other plans they are, and an entropy
reward.

Tokens that look alike at one place of a good plan and of a bad one (the sky behind both) are pushed both ways at once,
which teaches nothing and wears the model down. So the advantage of a token counts less the more it resembles, in the
codebook's space, the tokens at its place of plans that fared otherwise, and the KL counts more there.

P prompts, N plans per prompt, T tokens, C channels of the codebook.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glm_training.algorithms._tensors import ValueCheck, demand, finite, require_ndim, require_same_shape


class TokenWeights(NamedTuple):
    """Both [N, T] fp32: what multiplies the advantage of a token, 1 in the mean over the plans that count, and its
    KL, in [1/2, 1]."""

    advantage: Tensor
    kl: Tensor


def token_similarity(vectors: Tensor, advantages: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cosine, in [-1, 1], of each token to those at its place of the plans that fared otherwise, [N, T] fp32.

    `vectors` [N, T, C]: codes of the tokens of the plans of one prompt; `advantages` [N]. Plan j fared otherwise than
    plan i where A_i A_j <= 0 and j is not i; 0 where no plan did. `counted` [N] bool: plans that have an advantage at
    all; the others fared in no way, and get 0. Raises ValueError for shapes. No gradient, and no wait for the device.
    """
    require_ndim("vectors", vectors, 3, "[N, T, C]")
    if advantages.shape != vectors.shape[:1]:
        raise ValueError(f"advantages must have shape [{len(vectors)}], got {list(advantages.shape)}")
    if counted is not None:
        require_same_shape("counted", counted, "advantages", advantages)
    unit = torch.nn.functional.normalize(vectors.detach().float(), dim=2)
    advantages = advantages.detach().float()
    other = (advantages[:, None] * advantages[None, :] <= 0) & ~torch.eye(
        len(advantages), dtype=torch.bool, device=advantages.device
    )
    if counted is not None:
        other &= counted[:, None] & counted[None, :]
    partners = other.float()
    # the cosines to a sum of unit vectors are the sum of the cosines: no [N, N, T] is held
    total = torch.einsum("ij,jtc->itc", partners, unit)
    return (unit * total).sum(dim=2) / partners.sum(dim=1, keepdim=True).clamp(min=1)


def similarity_weights(similarity: Tensor, counted: Tensor | None = None) -> TokenWeights:
    """Weights of the tokens of one prompt's plans, of `token_similarity` s [N, T].

    Advantage: (1 - s) / 2 over its mean over the tokens of the `counted` [N] plans (zero everywhere where that is zero:
    all plans are one). KL: 1/2 + min(1 + s, 1) / 2. Raises ValueError for shapes.
    """
    require_ndim("similarity", similarity, 2, "[N, T]")
    unlike = ((1 - similarity.detach().float()) / 2).clamp(0, 1)
    keep = torch.ones(len(unlike), device=unlike.device) if counted is None else counted.to(unlike.dtype)
    if keep.shape != unlike.shape[:1]:
        raise ValueError(f"counted must have shape [{len(unlike)}], got {list(keep.shape)}")
    mean = (unlike * keep[:, None]).sum() / (keep.sum() * unlike.shape[1]).clamp(min=1)
    return TokenWeights(
        unlike / mean.clamp(min=torch.finfo(torch.float32).tiny),
        0.5 + 0.5 * (1 + similarity.detach().float()).clamp(0, 1),
    )


def entropy_bonus(
    rewards: Tensor, entropies: Tensor, reference_entropies: Tensor, *, check_finite: bool = True
) -> Tensor:
    """What a plan's reward gains for an entropy near the reference's, [P, N] fp32: r - mean of r over the prompt's best
    plans, r = 1 / (1 + (H - H_ref)^2), for those plans, and 0 for the others.

    `rewards` [P, N], NaN where there is none; `entropies` H and `reference_entropies` [P, N], means over the tokens of
    a plan in nats. Best are all plans with the prompt's largest reward: between equals, which rewards by rule have
    many of, the one that keeps its entropy is preferred, and a lone best plan gains nothing. Raises ValueError for
    shapes, and (one device synchronisation, skipped with check_finite=False) entropies that are not finite.
    """
    require_ndim("rewards", rewards, 2, "[P, N]")
    require_same_shape("entropies", entropies, "rewards", rewards)
    require_same_shape("reference_entropies", reference_entropies, "rewards", rewards)
    if check_finite:
        checks: list[ValueCheck] = [
            finite("entropies", entropies),
            finite("reference_entropies", reference_entropies),
        ]
        demand(*checks)
    near = 1 / (1 + (entropies.detach().float() - reference_entropies.detach().float()).square())
    scored = ~rewards.isnan()
    highest = rewards.masked_fill(~scored, -torch.inf).amax(dim=1, keepdim=True)
    best = (scored & (rewards == highest)).float()
    mean = (near * best).sum(dim=1, keepdim=True) / best.sum(dim=1, keepdim=True).clamp(min=1)
    return (near - mean) * best
