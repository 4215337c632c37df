"""The KL to the reference before anything was learned: it is zero, and a gradient comes back through it.

Both halves of a mistake are silent in a run: a reference that is another model pulls the policy away from the start,
and a KL without gradient holds it nowhere. The gradients are computed apart and thrown away, so `grad` stays as it was
and DDP, whose wrapper is left out, exchanges nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm_training.algorithms.flow_sde import gaussian_kl
from glm_training.algorithms.policy_loss import policy_loss
from glm_training.engine.errors import GateError
from glm_training.engine.parts import Part
from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.models.glm_image.dit_types import Trajectory
from glm_training.reinforcement.gate.tolerance import Tolerance

NUDGE = 0.5
"""How far the reference is moved away to see a gradient: nats per token, standard deviations of a denoising step."""
LOSS_SCALE = 2.0**10
"""Keeps the gradients of fp16 runs above zero."""


def check_ar_reference(
    method: ARPolicyGradient, part: Part, plans: ARRollout, tolerance: Tolerance, *, at_start: bool
) -> float:
    """Largest |log-prob - reference's| (nats) over the tokens of `plans`. Raises GateError."""
    with part.as_reference(), torch.no_grad():
        anchor = method.score(part.component, plans)
    now = method.score(part.component, plans)
    deviation = (now.detach() - anchor).abs()
    _require_start(part, deviation, tolerance, at_start)
    if not bool((now.detach() < 0).any()):
        return deviation.max().item()  # top-p left one code everywhere: certain tokens have no gradient
    moved = policy_loss(
        now,
        now.detach(),
        torch.zeros(len(now), device=now.device),
        clip=(0.2, 0.2),
        reference_log_probs=anchor + NUDGE,
        kl_coef=1.0,
        check_finite=False,
    )
    _require_alive(part, moved.loss)
    return deviation.max().item()


def check_dit_reference(
    method: object, part: Part, renders: Trajectory, tolerance: Tolerance, *, at_start: bool
) -> float:
    """Largest distance from the reference over the rows of `renders`; raises GateError.

    In log-prob (nats) of the first noisy step where the method has such steps, else root mean square in velocity at the
    last noise level.
    """
    if isinstance(method, FlowPolicyGradient):
        step = renders.sde_indices[0]
        with part.as_reference(), torch.no_grad():
            anchor = method.replay(part.component, renders, step)
        now = method.replay(part.component, renders, step)
        assert now.log_prob is not None and anchor.log_prob is not None  # the ODE kernel has no SDE steps
        deviation = (now.log_prob.detach() - anchor.log_prob).abs()
        moved = gaussian_kl(now.mean, anchor.mean + NUDGE * now.std, now.std).mean()
    else:
        with part.as_reference(), torch.no_grad():
            still = _velocity(part, renders)
        velocity = _velocity(part, renders)
        deviation = (velocity.detach() - still).square().flatten(1).mean(dim=1).sqrt()
        moved = (velocity - still - NUDGE).square().mean()
    _require_start(part, deviation[:, None], tolerance, at_start)
    _require_alive(part, moved)
    return deviation.max().item()


def _velocity(part: Part, renders: Trajectory) -> Tensor:
    times = renders.schedule.timesteps[-1].to(renders.final.device).expand(len(renders.final))
    return part.component(renders.final, times, renders.condition, guidance_scale=renders.guidance_scale)


def _require_start(part: Part, deviation: Tensor, tolerance: Tolerance, at_start: bool) -> None:
    """At the start of a run the model is its own reference. Later ones have moved, and are not asked."""
    if at_start and not tolerance.passes(deviation):
        raise GateError(
            f"the {part.name} half differs from its KL reference before any update, by up to "
            f"{deviation.max().item():.2e} (allowed {tolerance}): the reference is not the starting model. Likely "
            "causes: an adapter that does not start at zero, dropout, a reference loaded from elsewhere or in another "
            "dtype. reward.grpo.gate: false switches this check off"
        )


def _require_alive(part: Part, kl: Tensor) -> None:
    """A KL to a reference moved away must pull at the trained weights."""
    if not part.has_gradient(kl * LOSS_SCALE):
        raise GateError(
            f"the KL of the {part.name} half to its reference has no gradient in any trained weight: it would hold "
            "nothing. Likely causes: trained weights without requires_grad, a forward pass under no_grad or on "
            "detached inputs, adapters switched off. reward.grpo.gate: false switches this check off"
        )
