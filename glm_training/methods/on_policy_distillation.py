"""On-policy distillation (arXiv:2605.08063, 2605.15055): the student draws, and a frozen teacher says at the same
states what it would have drawn. No reward, no likelihood ratio.

Needs of a rollout: for the AR half tokens, for the DiT half a trajectory with the latents around its SDE steps. One
term per slice, or per SDE step. B rows, T tokens of a plan, K SDE steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from glm_training.algorithms.flow_sde import gaussian_kl
from glm_training.methods.ar_policy_gradient import ScoreTokens
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.losses import Context, MethodLoss, Velocity
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.models.glm_image.dit_types import Trajectory

_REPLAY = FlowPolicyGradient(clip=(1.0, 1.0), kl_coef=0.0)


def token_terms(policy: ScoreTokens, component: Any, teacher: Context, rollout: ARRollout) -> Iterator[MethodLoss]:
    """KL(student || teacher) in nats, the mean over the tokens that the student drew, over the distribution that drew
    them: of the codebook, at the rollout's temperature, within its nucleus.

    The closed form over all codes at each place; what the choice of a token does to later places is left out, as is
    usual. `policy` is `component`, an `ARComponent`, under training; inside `teacher` it has the teacher's weights,
    and no gradient.
    """
    options: dict[str, Any] = {"temperature": rollout.temperature, "support": rollout.support}
    with teacher():
        others = component.distributions(rollout.prompt, rollout.tokens, **options)
    kl = policy(rollout.prompt, rollout.tokens, others=others, **options)[1].mean()
    yield MethodLoss(kl, len(rollout), {"kl": kl.detach()})


def step_terms(policy: Velocity, component: Velocity, teacher: Context, trajectory: Trajectory) -> Iterator[MethodLoss]:
    """KL of the two Gaussians of each SDE step per latent dim, |mu - mu_teacher|^2 / (2 std^2), at the latents that the
    student came by: one loss per step, each already divided by their number. The states have no gradient.

    `policy`, `component` and `teacher` as in `token_terms`.
    """
    share = 1.0 / len(trajectory.sde_indices)
    for step in trajectory.sde_indices:
        # before the trained pass, so that none of its activations are held meanwhile
        with teacher():
            wanted = _REPLAY.replay(component, trajectory, step).mean
        now = _REPLAY.replay(policy, trajectory, step)
        kl = gaussian_kl(now.mean, wanted, now.std, check_finite=False).mean()
        yield MethodLoss(kl * share, len(trajectory.final), {"kl": kl.detach()})
