"""What a DiT call is conditioned on, and what a sampling run leaves behind. Plain data; no model in here.

Letters in shapes: P prompts, B rows (plans or renders, prompt-major), C x h x w latents (8 px each), G glyph tokens of
width D, U different source images, S steps of a schedule, K of them noisy, V latents that are stored of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm_training.algorithms.flow_sde import Kernel, SDEStep, sde_step


@dataclass(frozen=True)
class SourceCondition:
    """Source images of an i2i batch. Rows made from the same source share one entry, so it is encoded once.

    latents: ``[U, C, h, w]`` fp32, normalised VAE latents of the U different sources, all of one size.
    prior_tokens: ``[U, grid_h * grid_w]`` long, their VQ codes.
    grid: (rows, columns) of prior tokens; one token covers 32x32 px.
    rows: ``[B]`` long, which source each row of the batch reads.
    """

    latents: Tensor
    prior_tokens: Tensor
    grid: tuple[int, int]
    rows: Tensor

    def select(self, rows: Tensor) -> SourceCondition:
        """The given rows (long indices) in that order; sources nobody reads any more are let go."""
        used, inverse = self.rows[rows].unique(return_inverse=True)
        return replace(self, latents=self.latents[used], prior_tokens=self.prior_tokens[used], rows=inverse)

    def to(self, device: torch.device | str) -> SourceCondition:
        return replace(
            self,
            latents=self.latents.to(device),
            prior_tokens=self.prior_tokens.to(device),
            rows=self.rows.to(device),
        )


@dataclass(frozen=True)
class DiTCondition:
    """Everything but latents and time that the velocity of B images depends on.

    prior_tokens: ``[B, grid_h * grid_w]`` long in [0, codebook), raster order, not upsampled.
    grid: (rows, columns) of prior tokens, = (height / 32, width / 32).
    glyph: ``[B, G, D]`` text-encoder states of the quoted spans, right-padded to the longest row.
    glyph_mask: ``[B, G]`` bool, True where a glyph token is real; every row has at least one.
    height, width: pixels.
    source: what i2i rows refer to, None for t2i.
    dropped: ``[B]`` bool or None; True rows are the unconditional branch (no prior tokens, no source).
    """

    prior_tokens: Tensor
    grid: tuple[int, int]
    glyph: Tensor
    glyph_mask: Tensor
    height: int
    width: int
    source: SourceCondition | None = None
    dropped: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.prior_tokens.shape[0]

    def select(self, rows: Tensor) -> DiTCondition:
        """The given rows (long indices, repeats allowed, or a bool mask ``[B]``), glyphs cut to their longest."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        rows = rows.to(self.prior_tokens.device)
        mask = self.glyph_mask[rows]
        longest = int(mask.sum(dim=1).max()) if len(rows) else 1
        return replace(
            self,
            prior_tokens=self.prior_tokens[rows],
            glyph=self.glyph[rows, :longest],
            glyph_mask=mask[:, :longest],
            source=None if self.source is None else self.source.select(rows),
            dropped=None if self.dropped is None else self.dropped[rows],
        )

    def repeat_interleave(self, repeats: int) -> DiTCondition:
        """Each row `repeats` times in a row: the renders of one plan, ``[B * repeats]``."""
        rows = torch.arange(self.batch_size, device=self.prior_tokens.device)
        return self.select(rows.repeat_interleave(repeats))

    def to(self, device: torch.device | str) -> DiTCondition:
        return replace(
            self,
            prior_tokens=self.prior_tokens.to(device),
            glyph=self.glyph.to(device),
            glyph_mask=self.glyph_mask.to(device),
            source=None if self.source is None else self.source.to(device),
            dropped=None if self.dropped is None else self.dropped.to(device),
        )


@dataclass(frozen=True)
class FlowSchedule:
    """S steps from noise to image, on the CPU.

    timesteps: ``[S]`` fp32, what the DiT is conditioned on: whole numbers in [0, 999], unshifted.
    sigmas: ``[S + 1]`` fp32, the shifted noise levels the steps run between; the first is 1, the last 0.
    """

    timesteps: Tensor
    sigmas: Tensor

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def sigma_max(self) -> float:
        """The first sigma below 1: what stands in for sigma = 1 where the SDE's noise would be infinite."""
        return float(self.sigmas[self.sigmas < 1][0])


@dataclass(frozen=True)
class Trajectory:
    """One sampling run of B rows, with what is needed to replay its stochastic steps. All tensors fp32.

    final: ``[B, C, h, w]`` latents at sigma 0.
    sde_indices: the K steps that drew noise, ascending. log_probs: ``[B, K]``, mean over latent dims of the density of
    the step taken.
    stored: ``[B, V, C, h, w]``, the latents *before* step ``stored_steps[i]`` (index S is `final`): both ends of every
    SDE step; None when sampled with ``store=False``. means: ``[B, K, C, h, w]``, of the Gaussians that the SDE steps
    were drawn from; None unless they were asked for.
    condition, schedule, guidance_scale, kernel, eta: what sampled, so that a replay cannot use anything else.
    """

    final: Tensor
    sde_indices: tuple[int, ...]
    log_probs: Tensor
    condition: DiTCondition
    schedule: FlowSchedule
    guidance_scale: float
    kernel: Kernel
    eta: float
    stored: Tensor | None
    stored_steps: tuple[int, ...]
    means: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """Latents ``[B, C, h, w]`` before `step` (step S: the result). ValueError when they were not kept."""
        if step == self.schedule.steps:
            return self.final
        if self.stored is None:
            raise ValueError("this trajectory kept only its result; sample with store=True to replay it")
        if step not in self.stored_steps:
            raise ValueError(
                f"latents before step {step} were not kept: sde_indices {self.sde_indices} keep {self.stored_steps}"
            )
        return self.stored[:, self.stored_steps.index(step)]

    @property
    def latents(self) -> Tensor:
        """``[B, S + 1, C, h, w]`` when every step was an SDE step; otherwise ValueError: ask `at` for one step."""
        if self.stored is None or len(self.stored_steps) != self.schedule.steps + 1:
            raise ValueError(f"only steps {self.stored_steps} of {self.schedule.steps} were kept; use at(step)")
        return self.stored

    def select(self, rows: Tensor) -> Trajectory:
        """The given rows (long indices or a bool mask)."""
        return replace(
            self,
            final=self.final[rows],
            log_probs=self.log_probs[rows],
            condition=self.condition.select(rows),
            stored=None if self.stored is None else self.stored[rows],
            means=None if self.means is None else self.means[rows],
        )

    def to(self, device: torch.device | str) -> Trajectory:
        return replace(
            self,
            final=self.final.to(device),
            log_probs=self.log_probs.to(device),
            condition=self.condition.to(device),
            stored=None if self.stored is None else self.stored.to(device),
            means=None if self.means is None else self.means.to(device),
        )

    def mean_at(self, step: int) -> Tensor:
        """Mean ``[B, C, h, w]`` of the Gaussian that SDE step `step` drew from. ValueError when it was not kept."""
        if self.means is None or step not in self.sde_indices:
            raise ValueError(f"the mean of step {step} was not kept (sde_indices {self.sde_indices})")
        return self.means[:, self.sde_indices.index(step)]

    def score(self, step: int, velocity: Tensor) -> SDEStep:
        """Density of the step that was taken at `step` under `velocity` ``[B, C, h, w]``, with its gradient.

        ValueError when `step` is not one of `sde_indices`: an ODE step has no density.
        """
        if step not in self.sde_indices:
            raise ValueError(f"step {step} drew no noise (sde_indices {self.sde_indices}): it has no log-probability")
        return sde_step(
            self.at(step),
            velocity,
            self.schedule.sigmas[step],
            self.schedule.sigmas[step + 1],
            kernel=self.kernel,
            eta=self.eta,
            sigma_max=self.schedule.sigma_max,
            next_latents=self.at(step + 1),
            check_finite=False,
        )
