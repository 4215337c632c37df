"""Why a replay parts from its rollout: each likely mistake is made on purpose, and the one that gives the recorded
numbers again is named. A mistake that cannot be tried is listed as a possible cause, never as the one.

B samples, L tokens or denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient, Velocity
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.ar_types import ARPrompt, ARRollout
from glm_training.models.glm_image.dit_types import Trajectory
from glm_training.models.glm_image.token_sampling import nucleus, pack_support
from glm_training.reinforcement.gate.tolerance import Tolerance

Weights = Callable[[], AbstractContextManager[None]]
"""A context in which a component has other weights than those under training."""
Try = tuple[str, Callable[[], Tensor]]
"""What a mistake would be called, and the deviations [B, L] that are left when it is assumed."""

AR_CAUSES = "positions of the image grids, temperature or top-p support, codebook slice, dtype, an adapter switched off"
DIT_CAUSES = "guidance left out, timestep or sigma convention, latents stored in low precision, an adapter switched off"
CLEARLY = 0.1
"""Share of the deviation that an explanation may leave, besides passing the tolerance."""
TEMPERATURES = [0.25 * 1.26**k for k in range(13)]
"""Factors on the replayed temperature, 0.25 to 4, between which the one that drew is looked for."""
SHOWN = (torch.bfloat16, torch.float16)


def rounded_to(values: Tensor) -> str | None:
    """The low precision whose numbers all of `values` are, or None. Drawn fp32 values never all are."""
    for dtype in SHOWN:
        if values.dtype == dtype or bool((values == values.to(dtype).to(values.dtype)).all()):
            return str(dtype).removeprefix("torch.")
    return None


def explain_ar(
    method: ARPolicyGradient,
    component: ARComponent,
    plans: ARRollout,
    tolerance: Tolerance,
    others: Mapping[str, Weights],
) -> str:
    """One or two sentences on why `plans` are scored otherwise than they were drawn. `others`: weights to try, by what
    they would mean."""
    before = method.deviation(component, plans)

    def left(weights: Weights | None = None, **changes: object) -> Tensor:
        assumed = replace(plans, **changes)  # type: ignore[arg-type]
        if weights is None:
            return method.deviation(component, assumed)
        with weights():
            return method.deviation(component, assumed)

    def tries() -> Iterator[Try]:
        yield from ((text, partial(left, weights)) for text, weights in others.items())
        if plans.support is not None:
            yield "the rollout scored its tokens over all codes, without the top-p support", partial(left, support=None)
        for text, prompt in _misplaced(plans.prompt):
            yield text, partial(left, prompt=prompt)
        top_p, support = _fitted_support(method, component, plans)
        if support is not None:
            text = f"top-p (about {top_p:.2f}) drew the tokens and its support is missing in the replay"
            yield text, partial(left, support=support)
        value = _fitted_temperature(lambda value: left(temperature=value).mean().item(), plans.temperature)
        text = f"temperature {value:.4g} drew the tokens and {plans.temperature:.4g} scores them"
        yield text, partial(left, temperature=value)

    found = _first_that_explains(tries(), before, tolerance)
    if found is not None:
        return found
    precision = rounded_to(plans.log_probs)
    if precision is not None:
        return f"Looks like low precision: the recorded log-probs are {precision} numbers."
    if bool((before[:, 0] <= tolerance.limit).all()):
        return (
            "Token 0 depends on the prompt alone and agrees; what the later ones add are the tokens read before them "
            f"and their positions in the grids. Likely causes: {AR_CAUSES}."
        )
    return f"Likely causes: {AR_CAUSES}."


def explain_dit(
    method: FlowPolicyGradient,
    component: Velocity,
    renders: Trajectory,
    tolerance: Tolerance,
    others: Mapping[str, Weights],
) -> str:
    """One sentence on why the steps of `renders` are scored otherwise than they were drawn; `others` as above."""

    def deviation(assumed: Trajectory) -> Tensor:
        return torch.stack([method.deviation(component, assumed, step) for step in assumed.sde_indices], dim=1)

    def under(weights: Weights) -> Tensor:
        with weights():
            return deviation(renders)

    def tries() -> Iterator[Try]:
        yield from ((text, partial(under, weights)) for text, weights in others.items())
        for scale in _fitted_guidance(method, component, renders):
            what = f"guidance {scale:.4g} drew the steps and {renders.guidance_scale:.4g} scores them"
            left_out = 1.0 in (scale, renders.guidance_scale)
            text = f"guidance was left out: {what}" if left_out else what
            yield text, partial(deviation, replace(renders, guidance_scale=scale))
        schedule = renders.schedule
        conventions = {
            "the DiT was asked at shifted timesteps (1000 sigma)": (schedule.sigmas[:-1] * 1000).trunc(),
            "the DiT was asked one timestep later": (schedule.timesteps + 1).clamp(max=999),
            "the DiT was asked one timestep earlier": (schedule.timesteps - 1).clamp(min=0),
        }
        for text, timesteps in conventions.items():
            assumed = replace(renders, schedule=replace(schedule, timesteps=timesteps.clamp(0, 999)))
            yield text, partial(deviation, assumed)

    return _first_that_explains(tries(), deviation(renders), tolerance) or f"Likely causes: {DIT_CAUSES}."


def _first_that_explains(tries: Iterator[Try], before: Tensor, tolerance: Tolerance) -> str | None:
    """The first try under which the recorded numbers come out again."""
    for text, deviation in tries:
        left = deviation()
        if tolerance.passes(left) and bool(left.mean() <= CLEARLY * before.mean()):
            return f"Looks like this: {text}; assuming it, the recorded numbers come out again."
    return None


def _misplaced(prompt: ARPrompt) -> Iterator[tuple[str, ARPrompt]]:
    """The prompt with the positions of its grids as usual mistakes would have them."""
    places = prompt.decode_position_ids
    count = places.shape[-1]

    def placed(positions: Tensor) -> ARPrompt:
        return replace(prompt, decode_position_ids=positions)

    ramp = places[:, :, :1] + torch.arange(count, device=places.device)
    yield "wrong positions: the image tokens were drawn along a text ramp, not in their grids", placed(ramp)
    for offset, word in ((1, "late"), (-1, "early")):
        yield f"wrong positions: the grids were drawn one position too {word}", placed(places + offset)
    if prompt.preview_length:
        rows, columns = prompt.grids[0]
        mistakes = {"with the first": -max(rows, columns), "after as many positions as tokens": rows * columns}
        mistakes["after as many positions as tokens"] -= max(rows, columns)
        for text, offset in mistakes.items():
            moved = places.clone()
            moved[:, :, prompt.preview_length :] += offset
            yield f"wrong positions: the large grid was drawn as if it began {text} of the preview", placed(moved)


def _fitted_support(method: ARPolicyGradient, component: ARComponent, plans: ARRollout) -> tuple[float, Tensor | None]:
    """(top-p, packed support) under which a replay over all codes might have been drawn; None when it cannot have been.

    A draw from a nucleus of mass m is recorded as -log m above the replay. The smallest mass of all tokens, taken as
    top-p, keeps the very same codes at every token.
    """
    if plans.support is not None:
        return 1.0, None
    collected: list[Tensor] = []
    hook = component.model.lm_head.register_forward_hook(lambda module, inputs, output: collected.append(output))
    try:
        with torch.no_grad():
            replayed = method.score(component, plans)
    finally:
        hook.remove()
    mass = float((replayed - plans.log_probs).min().exp())
    if not 0 < mass < 1:
        return 1.0, None
    logits = torch.cat(collected, dim=1)[..., : component.num_codes].float() / plans.temperature
    top_p = mass * (1 - 1e-5)
    support = nucleus(logits.softmax(-1), top_p)
    # the smallest mass drifts with rounding, and a code drawn at its edge must not be impossible
    support.scatter_(-1, plans.tokens[..., None], True)
    return top_p, pack_support(support)


def _fitted_temperature(distance: Callable[[float], float], now: float) -> float:
    """The temperature with the smallest mean deviation: the best of a grid, then a golden section around it."""
    grid = [now * factor for factor in TEMPERATURES]
    values = [distance(value) for value in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    share = (5**0.5 - 1) / 2
    inner = [high - share * (high - low), low + share * (high - low)]
    at = [distance(value) for value in inner]
    for _ in range(30):
        if at[0] < at[1]:
            high, inner, at = inner[1], [inner[0], inner[0]], [at[0], at[0]]
            inner[0] = high - share * (high - low)
            at[0] = distance(inner[0])
        else:
            low, inner, at = inner[0], [inner[1], inner[1]], [at[1], at[1]]
            inner[1] = low + share * (high - low)
            at[1] = distance(inner[1])
    return round((low + high) / 2, 4)


def _fitted_guidance(method: FlowPolicyGradient, component: Velocity, renders: Trajectory) -> list[float]:
    """Guidance scales under which the worst step would have its recorded log-prob.

    The velocity, and with it the mean of a step, is linear in the scale, so the log-prob is a parabola in it: three
    replays give it, and at most two scales give the recorded number.
    """

    def log_probs(scale: float) -> Tensor:
        assumed = replace(renders, guidance_scale=scale)
        steps = [method.replay(component, assumed, step).log_prob for step in renders.sde_indices]
        return torch.stack([values for values in steps if values is not None], dim=1).double()

    with torch.no_grad():
        none, one, two = (log_probs(scale) for scale in (0.0, 1.0, 2.0))
    square = (two - 2 * one + none) / 2
    slope = one - none - square
    offset = none - renders.log_probs.double()
    row, column = divmod(int(square.abs().argmax()), square.shape[1])
    a, b, c = (float(value[row, column]) for value in (square, slope, offset))
    inside = b * b - 4 * a * c
    if not a or not inside >= 0:
        return []
    roots = [(-b + sign * inside**0.5) / (2 * a) for sign in (1, -1)]
    return [scale for root in roots if 0 <= root < 100 for scale in dict.fromkeys((round(root, 2), root))]
