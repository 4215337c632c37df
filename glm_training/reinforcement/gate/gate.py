"""The on-policy gate: a replay of what was just drawn must give the rollout's log-probs again.

A method that learns from ratios learns nonsense when they are off before anything was learned. The gate replays a
sample of a rollout before the first update and now and then later, and stops the run with the first token or timestep
that parts and what it looks like (`gate.diagnosis`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.engine.errors import GateError
from glm_training.engine.parts import Part
from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.models.glm_image.dit_types import Trajectory
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.lora import adapters_disabled, has_lora
from glm_training.reinforcement.gate.diagnosis import Weights, explain_ar, explain_dit, rounded_to
from glm_training.reinforcement.gate.reference import check_ar_reference, check_dit_reference
from glm_training.reinforcement.gate.tolerance import Tolerance, first_above, tolerance_for
from glm_training.reinforcement.rollout import Rollout, Uses, uses_all
from glm_training.utils.distributed import World, gather_objects

ROWS = 2
"""Samples of a rollout that are replayed: the first and the last, so that two prompts are seen where there are two."""
HOW_TO_PASS = "reward.grpo.gate: false switches this check off"


@dataclass(frozen=True)
class Situation:
    """When a check is made: before the update of step `step` + 1, in low precision or not."""

    step: int
    low_precision: bool
    asked: float | None

    def tolerance(self, part: str) -> Tolerance:
        return tolerance_for(part, self.asked, self.low_precision)

    def __str__(self) -> str:
        return "before any update" if self.step == 0 else f"before the update of step {self.step + 1}"


class OnPolicyGate:
    """Checks a rollout before the first update of a run or of a resumed one, then every `gate_interval` steps. What a
    resumed run checks besides, it does not log: its figures are those of a run that was never interrupted.

    AR: log-probs of all tokens of two samples. DiT: ratios of all noisy steps of two samples; a method that learns from
    final latents alone (NFT, AWM) has no trajectory, so nothing of its sampling can be replayed. Where a reference is
    kept, the first check also asks that the KL has a gradient, and before any update that the KL is zero.
    """

    def __init__(
        self, config: Config, world: World, family: GLMImage, parts: dict[str, Part], uses: Uses = uses_all
    ) -> None:
        self.config = config
        self.world = world
        self.family = family
        self.parts = parts
        self.uses = uses
        self._passed_at: int | None = None  # in the run, wherever it was interrupted
        self._checked = False  # in this process

    def due(self, step: int) -> bool:
        """Whether a rollout drawn after `step` finished steps is checked."""
        return self.config.reward.grpo.gate and (not self._checked or self._scheduled(step))

    def _scheduled(self, step: int) -> bool:
        """Whether a run that was never interrupted checks here."""
        interval = self.config.reward.grpo.gate_interval
        return self._passed_at is None or (interval is not None and step - self._passed_at >= interval)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: after how many steps the last check was made."""
        return {"passed_at": self._passed_at}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave."""
        self._passed_at = state["passed_at"]

    def check(self, step: int, rollout: Rollout, ar: ARPolicyGradient | None, dit: object | None) -> dict[str, float]:
        """The largest deviations, over all processes, for the log. Every process must call it, with the weights that
        drew.

        Raises GateError, on all processes, when one of them finds that replay and rollout part, and
        FloatingPointError in the same way for a replay that is not finite.
        """
        situation = Situation(step, self.config.low_precision(), self.config.reward.grpo.gate_tolerance)
        figures: dict[str, float] = {}
        failure: Exception | None = None
        try:
            if ar is not None:
                self.uses("ar")
                figures |= self._check_ar(situation, ar, rollout.plans)
            if dit is not None:
                self.uses("dit")
                figures |= self._check_dit(situation, dit, rollout.renders)
        except (GateError, FloatingPointError) as error:  # perhaps here alone, while the others go on to what follows
            failure = error
        everywhere = gather_objects(self.world, (failure, figures))
        for found, _ in everywhere:
            if found is not None:
                raise found
        self._checked = True
        if not self._scheduled(step):
            return {}
        self._passed_at = step
        return {name: max(row[name] for _, row in everywhere) for name in figures}

    def _check_ar(self, situation: Situation, method: ARPolicyGradient, plans: ARRollout) -> dict[str, float]:
        part, tolerance = self.parts["ar"], situation.tolerance("ar")
        rows = _sample(len(plans), plans.tokens.device)
        sample = plans.select(rows)
        deviation = method.deviation(part.component, sample)
        if not tolerance.passes(deviation):
            row, token = first_above(deviation, tolerance.limit)
            grid, (line, column) = place_of(plans, token)
            why = explain_ar(method, self.family.ar, sample, tolerance, self._other_weights("ar"))
            raise GateError(
                f"the AR half's replayed log-probs differ from the rollout's by up to {deviation.max().item():.2e} "
                f"nats (allowed {tolerance}) {situation}. The first to part is token {token} ({grid} grid, row {line}, "
                f"column {column}) of sample {rows[row]}. {why} {_way_out(situation)}"
            )
        figures = {"gate/ar_log_prob_max": deviation.max().item()}
        if not self._checked and part.reference is not None:
            distance = check_ar_reference(method, part, sample, tolerance, at_start=situation.step == 0)
            if self._passed_at is None:
                figures["gate/ar_reference_max"] = distance
        return figures

    def _check_dit(self, situation: Situation, method: object, renders: Trajectory) -> dict[str, float]:
        part, tolerance, figures = self.parts["dit"], situation.tolerance("dit"), {}
        rows = _sample(len(renders.final), renders.final.device)
        sample = renders.select(rows)
        if isinstance(method, FlowPolicyGradient):
            deviation = torch.stack(
                [method.deviation(part.component, sample, step) for step in renders.sde_indices], dim=1
            )
            self._check_storage(sample)
            if not tolerance.passes(deviation):
                row, column = first_above(deviation, tolerance.limit)
                step = renders.sde_indices[column]
                why = explain_dit(method, part.component, sample, tolerance, self._other_weights("dit"))
                raise GateError(
                    f"the DiT half's replayed ratios differ from 1 by up to {deviation.max().item():.2e} (allowed "
                    f"{tolerance}) {situation}. The first to part is denoising step {step} (timestep "
                    f"{renders.schedule.timesteps[step]:.0f}) of sample {rows[row]}. {why} {_way_out(situation)}"
                )
            figures["gate/dit_ratio_max"] = deviation.max().item()
        if not self._checked and part.reference is not None:
            distance = check_dit_reference(method, part, sample, tolerance, at_start=situation.step == 0)
            if self._passed_at is None:
                figures["gate/dit_reference_max"] = distance
        return figures

    def _check_storage(self, renders: Trajectory) -> None:
        """Latents must be kept in fp32. On a large picture rounding hides in the mean over its dims, so it is looked
        for in the numbers themselves."""
        for step in renders.stored_steps:
            precision = rounded_to(renders.at(step))
            if precision is not None:
                time = (
                    f"timestep {renders.schedule.timesteps[step]:.0f}" if step < renders.schedule.steps else "the end"
                )
                raise GateError(
                    f"the DiT half's trajectory is stored in low precision: the latents before denoising step {step} "
                    f"({time}) hold {precision} numbers. Ratios of such latents are off by more than the clip range: "
                    f"keep them in float32. {HOW_TO_PASS}"
                )

    def _other_weights(self, part: str) -> dict[str, Weights]:
        """What else than the present weights may have drawn the rollout."""
        others: dict[str, Weights] = {}
        module = self.family.module(part)
        if has_lora(module):
            others["the adapter was switched off, or was not there yet, when the rollout was drawn"] = lambda: (
                adapters_disabled(module)
            )
        if self.parts[part].reference is not None:
            others["the rollout was drawn with the reference's weights, not with those under training"] = self.parts[
                part
            ].as_reference
        return others


def place_of(plans: ARRollout, token: int) -> tuple[str, tuple[int, int]]:
    """Grid, and (row, column) in it, of token `token`."""
    names = ("preview", "large") if plans.prompt.preview_length else ("large",)
    offset = 0
    for name, (rows, columns) in zip(names, plans.prompt.grids, strict=True):
        if token < offset + rows * columns:
            return name, divmod(token - offset, columns)
        offset += rows * columns
    raise ValueError(f"token {token} lies outside the grids {plans.prompt.grids}")


def _sample(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(ROWS, count), device=device).round().long()


def _way_out(situation: Situation) -> str:
    if not situation.low_precision:
        return HOW_TO_PASS
    return f"In low precision a larger reward.grpo.gate_tolerance may be right; {HOW_TO_PASS}"
