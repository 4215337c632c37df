"""Flow matching of single tokens, as VGT's generator does it: data at t = 1, one noise level per token.

x_t = t * clean + (1 - t) * noise; velocity = clean - noise; score = (t * velocity - x_t) / (1 - t). This is the path of
`flow_matching` walked the other way, sigma = 1 - t. Every state is fp32; no function draws random numbers or waits for
the device.

Letters: N steps, C latent channels, *dims whatever stands before the channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glm_training.algorithms._tensors import require_same_shape

TIME_SHIFT = 1.4
"""Published shift of the noise level; above 1 it trains more noise."""

LAST_TIME = 0.96
"""Where the stochastic steps end; one Euler step leads from there to the data. The score's 1 / (1 - t) has no end."""

NORM_EPS = 1e-6


def token_times(draws: Tensor, shift: float = TIME_SHIFT) -> Tensor:
    """Noise levels t in [0, 1], fp32, the shape of `draws`, which are standard normal.

    s = sigmoid(draw) is a logit-normal noise level; shifted and turned round it is t = 1 - shift * s / (1 + (shift - 1)
    * s) (SD3, arXiv:2403.03206). Its median is 1 / (1 + shift). Raises ValueError unless shift > 0.
    """
    if not shift > 0:
        raise ValueError(f"shift must be > 0, got {shift}")
    level = torch.sigmoid(draws.float())
    return 1 - shift * level / (1 + (shift - 1) * level)


def noised(clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target velocity), fp32 [*dims, C], of `clean` and `noise` [*dims, C] at `times` [*dims].

    Raises ValueError for shapes.
    """
    require_same_shape("noise", noise, "clean", clean)
    if times.shape != clean.shape[:-1]:
        raise ValueError(f"times must be {list(clean.shape[:-1])}, one per token; got {list(times.shape)}")
    clean, noise, times = clean.float(), noise.float(), times.float()[..., None]
    return times * clean + (1 - times) * noise, clean - noise


def guidance_weight(guidance: float, group: int, groups: int) -> float:
    """w of v_u + w * (v_c - v_u) for the tokens of `group`, counted from 0, of `groups`.

    w = 1 + (guidance - 1) * (groups - group) / groups: the whole guidance for the first group, almost none for the
    last. Raises ValueError for a group that is not there.
    """
    if not 0 <= group < groups:
        raise ValueError(f"group must lie in [0, {groups}), got {group}")
    return 1 + (guidance - 1) * (groups - group) / groups


def sde_step(state: Tensor, velocity: Tensor, time: float, step: float, noise: Tensor) -> Tensor:
    """One Euler-Maruyama step of length `step` from `time` < 1, all tensors of one shape and fp32.

    dx = (v + (1 - t) * score) dt + sqrt(2 * (1 - t)) dw, which keeps the marginals of the path (SiT, arXiv:2401.08740).
    """
    score = (time * velocity - state) / (1 - time)
    drift = velocity + (1 - time) * score
    return state + drift * step + (2 * (1 - time) * step) ** 0.5 * noise


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor) -> Tensor:
    """Data [*dims, C] drawn with `velocity(x_t, t)` from standard normal `noise` [N, *dims, C], fp32.

    noise[0] is the state at t = 0. The N - 1 steps between the N points of linspace(0, 0.96) are stochastic, each with
    the next noise; from .96 one Euler step along the velocity leads to 1. So the velocity is asked N times. Raises
    ValueError for N < 2.
    """
    steps = len(noise)
    if steps < 2:
        raise ValueError(f"at least 2 steps are needed, got {steps}")
    step = LAST_TIME / (steps - 1)
    state = noise[0].float()
    for number in range(steps - 1):
        time = number * step
        state = sde_step(state, velocity(state, time).float(), time, step, noise[number + 1].float())
    return state + (1 - LAST_TIME) * velocity(state, LAST_TIME).float()


def channel_norm(latents: Tensor, dim: int = 1) -> Tensor:
    """`latents` with mean 0 and variance 1 over the channels in `dim`, at each place by itself, fp32.

    LayerNorm without weights, eps 1e-6: what VGT's autoencoder of stage 2 does to its latents.
    """
    last = latents.float().movedim(dim, -1)
    return F.layer_norm(last, last.shape[-1:], eps=NORM_EPS).movedim(-1, dim)
