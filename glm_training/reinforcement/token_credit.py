"""What STAGE (arXiv:2509.25027) adds to the credit of the AR half's plans: their entropy, and the weights of their
tokens. P prompts, N plans per prompt, T tokens of a plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_training.algorithms.stage import similarity_weights, token_similarity
from glm_training.engine.figures import Mean
from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.updates import Learning, ar_slices
from glm_training.utils.distributed import gather_tensor


@torch.no_grad()
def measure_entropies(run: Learning, method: ARPolicyGradient, chunks: list[Scored]) -> dict[str, float]:
    """Fills in `Scored.entropies`, by a pass under the weights that drew and one under the reference, and returns their
    means over the step. A plan without a score keeps 0 in both."""
    part = run.parts["ar"]
    slices = ar_slices(run, chunks)
    for chunk in chunks:
        chunk.entropies = torch.zeros(2, len(chunk.rollout.plans), device=run.world.device)
    for row in (0, 1):
        for piece in slices:
            run.check_stop()
            plans = chunks[piece.chunk].rollout.plans.select(piece.rows)
            with run.autocast():
                if row == 0:
                    found = method.score(part.component, plans, entropy=True)[1]
                else:
                    with part.as_reference():
                        found = method.score(part.component, plans, entropy=True)[1]
            if piece.counted:
                chunks[piece.chunk].entropies[row, piece.rows] = found.mean(dim=1)
    scored = gather_tensor(run.world, torch.cat([chunk.has_score("ar") for chunk in chunks]))
    every = gather_tensor(run.world, torch.cat([chunk.entropies.T.cpu() for chunk in chunks]))[scored]
    if not len(every):
        return {}
    drawn, reference = every.mean(dim=0).tolist()
    return {
        "ar/drawn_entropy": Mean(drawn, len(every)),
        "ar/reference_entropy": Mean(reference, len(every)),
    }


@torch.no_grad()
def weigh_tokens(chunks: list[Scored], vectors: Callable[[Tensor], Tensor]) -> None:
    """Fills in `Scored.token_weights`; `vectors` gives the codes [N, T, C] of tokens [N, T]. Plans that the loss leaves
    out fared in no way: one of them has a score and yet no advantage where the AR half's own metrics do not apply."""
    for chunk in chunks:
        plans = len(chunk.rollout.plans) // len(chunk.rollout.prompts)
        counted = chunk.learned_from("ar").to(chunk.plan_advantages.device)
        weights = []
        for tokens, advantages, own in zip(
            chunk.rollout.plans.tokens.split(plans),
            chunk.plan_advantages.split(plans),
            counted.split(plans),
            strict=True,
        ):
            similarity = token_similarity(vectors(tokens), advantages, own)
            weights.append(torch.stack(similarity_weights(similarity, own), dim=1))
        chunk.token_weights = torch.cat(weights)
