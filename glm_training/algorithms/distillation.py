"""Few-step distillation by distribution matching (DMD2, arXiv:2405.14867) with reinforcement (DMDR).

A generator makes x0 in few steps. Two denoisers look at a renoised x0: the real one (the teacher) says where real
images lie, the fake one, trained on the generator's own samples, where the generator's lie. Their difference is the
gradient of the KL between the two distributions.

B samples of any latent dimensions, [B, *dims]; D features of a text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm_training.algorithms._tensors import (
    demand,
    finite,
    mean_per_sample,
    require_batched,
    require_ndim,
    require_positive,
    require_same_shape,
)

_SMALLEST_NORM = 1e-8


def distribution_matching_loss(
    generated: Tensor, real_prediction: Tensor, fake_prediction: Tensor, *, check_finite: bool = True
) -> Tensor:
    """0-dim 1/2 MSE(x0, sg(x0 - g)), g = (p_r - p_f) / mean|p_r| per sample, p_r = x0 - x0_real, p_f = x0 - x0_fake.

    `generated` x0, and the two clean predictions x0_real, x0_fake of its renoised self, [B, *dims]. The gradient with
    respect to x0 is g / numel: a descent step moves it towards what the teacher predicts, away from what the fake score
    does. It flows into `generated` alone. Raises ValueError for shapes and (one device synchronisation, skipped with
    check_finite=False) non-finite input.
    """
    require_batched("generated", generated)
    require_same_shape("real_prediction", real_prediction, "generated", generated)
    require_same_shape("fake_prediction", fake_prediction, "generated", generated)
    if check_finite:
        demand(
            finite("generated", generated),
            finite("real_prediction", real_prediction),
            finite("fake_prediction", fake_prediction),
        )
    generated = generated.float()
    fixed = generated.detach()  # the gradient comes through the left side of the square alone
    to_real, to_fake = fixed - real_prediction.detach().float(), fixed - fake_prediction.detach().float()
    # by the distance to the teacher: late levels of noise, where it is small, would hardly count
    norm = mean_per_sample(to_real.abs()).clamp(min=_SMALLEST_NORM)
    gradient = (to_real - to_fake) / norm.view(-1, *[1] * (generated.ndim - 1))
    return (generated - (fixed - gradient)).square().mean() / 2


def guidance_scale_decay(step: int, total: int, start: float) -> float:
    """DynaDG: the LoRA scale of the real branch, start * (1 + cos(pi step / total)) / 2, and 0 from `total` on.

    At first the teacher leans towards the generator's own distribution, where the two overlap; then it is itself.
    Raises ValueError for a negative step, total < 1 or a negative start.
    """
    _require_schedule(step, total)
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be a finite number >= 0, got {start}")
    return start * _cosine(step, total)


def renoise_beta(step: int, total: int) -> tuple[float, float]:
    """DynaRS: (alpha, beta) of the Beta distribution of renoising levels in [0, 1], 1 being pure noise.

    alpha = 1 + 3 c, beta = 1 + c / 2 with c = (1 + cos(pi step / total)) / 2 and 0 from `total` on: (4, 1.5) at first
    (mean 0.727, high noise, where the two distributions overlap), uniform at the end. Raises ValueError for a negative
    step or total < 1.
    """
    _require_schedule(step, total)
    share = _cosine(step, total)
    return 1 + 3 * share, 1 + share / 2


def reward_hinge(score: Tensor, threshold: float = 0.7, *, check_finite: bool = True) -> Tensor:
    """0-dim mean of relu(threshold - score) over `score` [B] (ReFL): no gradient where the score is good enough.

    Raises ValueError for a wrong shape, a threshold that is not finite, and (one device synchronisation, skipped with
    check_finite=False) non-finite scores.
    """
    require_ndim("score", score, 1, "[B]")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")
    if check_finite:
        demand(finite("score", score))
    return torch.relu(threshold - score.float()).mean()


def srpo_text_feature(positive: Tensor, negative: Tensor, strength: float, *, check_finite: bool = True) -> Tensor:
    """SRPO's text feature [B, D]: (k + 1) f_pos - f_neg, k = `strength` > 0 (arXiv:2509.06942).

    `positive`, `negative` [B, D]: features of the prompt with a wanted and with an unwanted word before it; the result
    is not normalised. Raises ValueError for shapes, k <= 0, and (one device synchronisation, skipped with
    check_finite=False) non-finite features.
    """
    require_ndim("positive", positive, 2, "[B, D]")
    require_same_shape("negative", negative, "positive", positive)
    require_positive("strength", strength)
    if check_finite:
        demand(finite("positive", positive), finite("negative", negative))
    return (strength + 1) * positive - negative


def _require_schedule(step: int, total: int) -> None:
    if step < 0 or total < 1:
        raise ValueError(f"step must be >= 0 and total >= 1, got {step} and {total}")


def _cosine(step: int, total: int) -> float:
    """From 1 at step 0 to 0 from `total` on."""
    return 0.5 * (1 + math.cos(math.pi * step / total)) if step < total else 0.0
