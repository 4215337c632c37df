"""Drawing the samples of a reward step: N plans of each of P prompts by the AR half, M renders per plan by the DiT."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.flow_sde import Kernel, sde_window
from glm_training.config import Config
from glm_training.data import Batch
from glm_training.models.glm_image.ar_types import ARRollout, Sources
from glm_training.models.glm_image.dit_types import Trajectory
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.sampling import step_hooks
from glm_training.utils.randomness import normal, uniform

IMAGES_ON_CPU = 8
"""Decoded together there: more of them leave the cache."""

Uses = Callable[..., None]
"""Called with the names of what is computed with from here on: `ar`, `dit`, `vae`."""


def uses_all(*names: str) -> None:
    """Nobody minds what is used."""


@dataclass
class Rollout:
    """The samples of P prompts. Row (p, n) of `plans` is p*N + n, row (p, n, m) of `renders` and `images` (p*N+n)*M+m.

    positions: of each prompt in the run's sequence of samples; they name every random draw. images: [P*N*M, 3, H, W]
    fp32 in [0, 1], on the device; targets, sources: [P, 3, H', W'], where the data have them. plan_seconds: what
    drawing the plans took.
    """

    prompts: list[str]
    positions: list[int]
    plans: ARRollout
    renders: Trajectory
    images: Tensor
    targets: Tensor | None
    sources: Tensor | None
    plan_seconds: float = 0.0


@dataclass(frozen=True)
class RolloutSettings:
    """How samples are drawn. `share_render_noise`: render m of every plan of a prompt starts from the same noise.
    `branch`: so do all renders of a plan, and they part at the first noisy step. `keep_means`: of
    the noisy steps, for methods that need the policy that drew."""

    height: int
    width: int
    plans: int
    renders: int
    temperature: float
    top_p: float
    do_sample: bool
    num_inference_steps: int
    guidance_scale: float
    kernel: Kernel
    eta: float
    share_render_noise: bool
    branch: bool
    keep_means: bool
    micro_batch_size: int | None
    vae_batch_size: int | None

    @property
    def group(self) -> int:
        """Images per prompt."""
        return self.plans * self.renders


def rollout_settings(config: Config) -> RolloutSettings:
    """How training samples are drawn. When only the AR half learns, its plans share the render noise."""
    sampling, group, dit = config.rollout_sampling(), config.group(), config.reward.grpo.dit
    return RolloutSettings(
        height=config.data.image_size.height,
        width=config.data.image_size.width,
        plans=group.plans,
        renders=group.renders,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        do_sample=sampling.do_sample,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        kernel=config.rollout.sde_kernel,
        eta=config.rollout.eta,
        share_render_noise=config.model.component == "ar",
        branch=config.rollout.branch,
        keep_means=dit.ratio == "guard" or dit.divergence_threshold is not None,
        micro_batch_size=config.rollout.micro_batch_size,
        vae_batch_size=config.rollout.vae_batch_size,
    )


def _go_on() -> None:
    """Nobody is waited for."""


def noisy_steps(config: Config, settings: RolloutSettings, step: int) -> tuple[int, ...]:
    """The denoising steps of training step `step` that are SDE steps."""
    rollout = config.rollout
    window = rollout.sde_window_range
    return sde_window(
        step,
        settings.num_inference_steps,
        size=rollout.sde_window_size,
        strategy=rollout.sde_window_strategy,
        kernel=rollout.sde_kernel,
        step_range=None if window is None else (window[0], window[1]),
        interval=rollout.sde_window_interval,
        uniform=uniform(config.seed, "rollout/window", [(step,)], (1,)).item(),
    )


@torch.no_grad()
def draw_rollout(
    family: GLMImage,
    batch: Batch,
    positions: Sequence[int],
    settings: RolloutSettings,
    *,
    sources: Sources | None = None,
    seed: int,
    sde_indices: tuple[int, ...] = (),
    on_step: Callable[[], None] | None = None,
    meet: Callable[[], None] | None = None,
    decode: bool = True,
    uses: Uses = uses_all,
) -> Rollout:
    """Samples for the prompts of `batch`. Every draw depends on (seed, position, plan, render) alone.

    `sources`: the batch's, where they are encoded already. `settings.micro_batch_size` bounds the samples on the device
    in each pass; the noise waits on the CPU. Without `decode` there are no images. `uses` is told before each stage
    what it computes with. `on_step` is called every few tokens and at each denoising step, `meet` before each half
    draws, where processes that share its shards wait for each other; both may raise to abandon the rollout. Raises
    FloatingPointError when logits, latents or pixels are not finite.
    """
    token_hook, step_hook = step_hooks(on_step)
    edited = batch.sources if sources is None else sources
    meet = meet or _go_on
    uses("ar")
    meet()
    started = time.perf_counter()
    plans = draw_plans(family, batch.prompts, edited, positions, settings, seed=seed, on_step=token_hook)
    seconds = time.perf_counter() - started  # the plans' last check waited for the device
    prompt = plans.prompt
    source_tokens = None if prompt.source_tokens is None else prompt.source_tokens[:: settings.plans]
    meet()
    uses("dit", "vae")  # which looks at sources that are not encoded yet
    condition = family.dit.condition(
        batch.prompts, plans.large_tokens, prompt.large_grid, edited, source_tokens, prompt.source_grid
    ).repeat_interleave(settings.renders)
    shape = family.dit.latent_shape(settings.height, settings.width)
    noise, step_noise = _noise(positions, settings, shape, seed, sde_indices)
    renders = family.dit.sample(
        noise,
        condition,
        family.dit.schedule(settings.num_inference_steps, settings.height, settings.width),
        guidance_scale=settings.guidance_scale,
        kernel=settings.kernel,
        eta=settings.eta,
        sde_indices=sde_indices,
        step_noise=step_noise,
        store=bool(sde_indices),
        keep_means=settings.keep_means and bool(sde_indices),
        branches=settings.renders if settings.branch else 1,
        micro_batch_size=settings.micro_batch_size,
        on_step=step_hook,
    )
    uses("vae")
    images = _decoded(family, renders.final, settings) if decode else noise.new_empty(0, 3, *shape[1:])
    return Rollout(list(batch.prompts), list(positions), plans, renders, images, batch.targets, batch.sources, seconds)


def _noise(
    positions: Sequence[int], settings: RolloutSettings, shape: tuple[int, ...], seed: int, sde_indices: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Where the renders start [P*N*M, C, h, w], and the noise of each noisy step [steps, P*N*M, C, h, w]."""
    names = [
        (p, 0 if settings.share_render_noise else n, m)
        for p in positions
        for n in range(settings.plans)
        for m in range(settings.renders)
    ]
    # branches of a plan begin as its render 0 does, and part by their own step noise
    starts = [(p, n, 0) for p, n, _ in names] if settings.branch else names
    noise = normal(seed, "rollout/latents", starts, shape)
    step_noise = None
    if sde_indices:
        step_noise = torch.stack([normal(seed, f"rollout/step-{k}", names, shape) for k in sde_indices])
    return noise, step_noise


def _decoded(family: GLMImage, final: Tensor, settings: RolloutSettings) -> Tensor:
    together = settings.vae_batch_size or (IMAGES_ON_CPU if final.device.type == "cpu" else len(final))
    return family.dit.decode_latents(final, micro_batch_size=together).float()


def draw_plans(
    family: GLMImage,
    prompts: Sequence[str],
    sources: Sources | None,
    positions: Sequence[int],
    settings: RolloutSettings,
    *,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> ARRollout:
    """The token plans alone, [P*N] rows; `on_step` as in `ARComponent.rollout`."""
    prompt = family.ar.encode_prompts(list(prompts), settings.height, settings.width, sources)
    names = [(p, n) for p in positions for n in range(settings.plans)]
    uniforms = uniform(seed, "rollout/tokens", names, (prompt.T,), device=family.ar.device)
    return family.ar.rollout(
        prompt,
        settings.plans,
        uniforms,
        temperature=settings.temperature,
        top_p=settings.top_p,
        do_sample=settings.do_sample,
        micro_batch_size=settings.micro_batch_size,
        on_step=on_step,
    )
