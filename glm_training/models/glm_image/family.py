"""GLM-Image as one object: the AR half that plans, the DiT half that renders, and the way in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
from torch import Tensor, nn

from glm_training.models.denoising import Denoiser, Levels, Network
from glm_training.models.family import DECODED_AT_ONCE, Family, Sampling, read_few_steps
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.decode_graph import Mode, Stepper
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.latents import decode_latents, encode_images
from glm_training.models.glm_image.loading import ModelLoadError, load_pipeline
from glm_training.models.glm_image.prompt_text import PromptReader
from glm_training.models.glm_image.sampling import step_hooks
from glm_training.models.lora import load_lora, save_lora
from glm_training.models.prompt_reading import PromptReading
from glm_training.models.run_folders import pipeline_in
from glm_training.utils.randomness import normal, uniform

__all__ = ["DiTDenoiser", "GLMImage", "ModelLoadError"]


class DiTDenoiser(Denoiser):
    """GLM-Image's noise levels, for images of `height` x `width` px: sigma = shift(u) is the spread and 1 - sigma the
    signal; the network is told the unshifted time of a shifted level.

    Few-step sampling is the stock pipeline's Euler steps.
    """

    prediction = "velocity"
    renoises = False

    def __init__(self, component: DiTComponent, height: int, width: int) -> None:
        self._component = component
        self._size = height, width

    def levels(self, u: Tensor) -> Levels:
        timestep, sigma = self._component.training_sigmas(u, *self._size)
        return Levels(timestep, 1 - sigma, sigma)

    def sampling_levels(self, steps: int) -> Levels:
        schedule = self._component.schedule(steps, *self._size)
        sigma = schedule.sigmas[:-1]
        return Levels(schedule.timesteps, 1 - sigma, sigma)

    def predict(
        self, network: Network, noisy: Tensor, levels: Levels, condition: DiTCondition, *, guidance_scale: float = 1.0
    ) -> Tensor:
        return network(noisy, levels.timestep.to(noisy.device), condition, guidance_scale=guidance_scale)


AT_ONCE = DECODED_AT_ONCE["glm_image"]


class GLMImage(Family):
    """A whole GLM-Image. `ar` and `dit` hold the stock modules; nothing is trainable until `set_trainable`."""

    components: tuple[str, ...] = ("ar", "dit")

    def __init__(self, ar: ARComponent, dit: DiTComponent) -> None:
        self.ar = ar
        self.dit = dit
        self.set_trainable()
        self.eval()

    # -- in and out ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pipeline(cls, pipeline: GlmImagePipeline) -> GLMImage:
        """Around the modules of a stock pipeline, which they go on sharing."""
        return cls(
            ARComponent(pipeline.vision_language_encoder, pipeline.processor),
            DiTComponent(
                pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler
            ),
        )

    @staticmethod
    def load(
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        local_files_only: bool = False,
        seed: int = 0,
        cuda_graph: Mode = "auto",
    ) -> GLMImage:
        """From "tiny", "tiny-random" or "full-width" (random weights from `seed`), the folder of a pipeline or of a
        checkpoint with one, or a hub id at `revision`.

        Weights in `dtype` on `device`. `cuda_graph`: how the AR half takes its steps (`decode_graph.Stepper`). Raises
        ModelLoadError, which says what to do.
        """
        source = pipeline_in(name_or_path)
        pipeline = load_pipeline(
            source,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            seed=seed,
        )
        try:
            family = GLMImage.from_pipeline(pipeline).to(device)
            family.few_steps = read_few_steps(source)
            family.ar.stepper = Stepper(cuda_graph)
        except ValueError as error:
            raise ModelLoadError(f"cannot use {name_or_path} as a GLM-Image: {error}") from error
        return family

    def to_pipeline(self) -> GlmImagePipeline:
        """A stock pipeline over these very modules, adapters included, whose AR half draws as ours does."""
        self.ar.limit_stock_generation()
        parts: dict[str, Any] = {
            "tokenizer": self.dit.tokenizer,
            "processor": self.ar.processor,
            "text_encoder": self.dit.text_encoder,
            "vision_language_encoder": self.ar.model,
            "vae": self.dit.vae,
            "transformer": self.dit.transformer,
            "scheduler": self.dit.scheduler,
        }
        return GlmImagePipeline(**parts)

    def save_lora(self, component: str, folder: str | Path) -> None:
        """Write the adapter of a half as a PEFT folder."""
        save_lora(self.module(component), folder)

    def load_lora(self, component: str, folder: str | Path) -> None:
        load_lora(self.module(component), folder)

    # -- what is trained -----------------------------------------------------------------------------------------------

    def component(self, name: str) -> ARComponent | DiTComponent:
        self._known(name)
        return self.ar if name == "ar" else self.dit

    def module(self, name: str) -> nn.Module:
        self._known(name)
        return self.ar.model if name == "ar" else self.dit.transformer

    def frozen(self) -> list[nn.Module]:
        """VAE, text encoder, vision tower and VQ model."""
        return [self.dit.vae, self.dit.text_encoder, self.ar.model.model.visual, self.ar.model.model.vqmodel]

    def residents(self) -> dict[str, list[nn.Module]]:
        """What takes turns on the device, by name: of each half what it computes with at each step, and the VAE. The
        other frozen encoders look at pictures and texts once."""
        return {
            "ar": [self.ar.model.model.language_model, self.ar.model.lm_head],
            "dit": [self.dit.transformer],
            "vae": [self.dit.vae],
        }

    def read_prompts(
        self, prompts: Sequence[str], height: int, width: int, mode: Literal["t2i", "i2i"]
    ) -> list[PromptReading]:
        return PromptReader(self.ar.processor.tokenizer, self.ar.model.config).read(prompts, height, width, mode)

    def denoiser(self, height: int, width: int) -> DiTDenoiser:
        return DiTDenoiser(self.dit, height, width)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        return decode_latents(self.dit.vae, encode_images(self.dit.vae, images, len(images)), len(images))

    def own_size(self) -> int:
        """128 for the tiny model and what is made from it."""
        return min(self.dit.vae.config["sample_size"], 1024)

    # -- images --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        sources: Tensor | None = None,
        seed: int,
        plans: int = 1,
        renders: int = 1,
        temperature: float = 0.9,
        top_p: float = 0.75,
        do_sample: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.5,
        share_render_noise: bool = False,
        prompt_ids: Sequence[int] | None = None,
        micro_batch_size: int | None = None,
        vae_batch_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """N plans per prompt and M renders per plan: images ``[P * N * M, 3, height, width]`` fp32 in [0, 1].

        Image (p, n, m) lies at ``(p * N + n) * M + m`` (prompt-major) and depends on its prompt and on (seed,
        prompt_ids[p], n, m) alone, not on its neighbours; `prompt_ids` are 0..P-1 unless given. With
        `share_render_noise` render m of every plan of a prompt starts from the same noise, so that plans differ by
        their tokens only. `sources` ``[P, 3, h, w]`` in [0, 1] makes it image-to-image. The defaults are the stock
        pipeline's. `micro_batch_size` samples are written and rendered at once (None: all), and `vae_batch_size`
        decoded (None: as many, or `DECODED_AT_ONCE`). `on_step` is called every few tokens and at each denoising step,
        and may raise. ValueError for sizes that are not multiples of 32 px and counts below 1.
        """
        ids = _checked_ids(len(prompts), prompt_ids, plans, renders)
        prompt = self.ar.encode_prompts(list(prompts), height, width, sources)
        plan_names = [(p, n) for p in ids for n in range(plans)]
        token_hook, step_hook = step_hooks(on_step)
        rollout = self.ar.rollout(
            prompt,
            plans,
            uniform(seed, "generate/tokens", plan_names, (prompt.T,), device=self.ar.device),
            temperature=temperature,
            top_p=top_p,
            do_sample=do_sample,
            micro_batch_size=micro_batch_size,
            on_step=token_hook,
        )
        _meet(on_step)  # whoever has no plans says so before the DiT's shards are gathered
        condition = self.dit.condition(
            prompts, rollout.large_tokens, prompt.large_grid, sources, prompt.source_tokens, prompt.source_grid
        ).repeat_interleave(renders)
        names = [(p, 0 if share_render_noise else n, m) for p, n in plan_names for m in range(renders)]
        noise = normal(seed, "generate/latents", names, self.dit.latent_shape(height, width), device=self.dit.device)
        trajectory = self.dit.sample(
            noise,
            condition,
            self.dit.schedule(num_inference_steps, height, width),
            guidance_scale=guidance_scale,
            micro_batch_size=micro_batch_size,
            on_step=step_hook,
        )
        return self.dit.decode_latents(trajectory.final, micro_batch_size=vae_batch_size or micro_batch_size or AT_ONCE)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        seed: int,
        sampling: Sampling,
        samples: int = 1,
        renders: int = 1,
        sources: Tensor | None = None,
        prompt_ids: Sequence[int] | None = None,
        micro_batch_size: int | None = None,
        vae_batch_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """`generate` with `samples` plans per prompt, and `renders` of each."""
        return self.generate(
            prompts,
            height=height,
            width=width,
            sources=sources,
            seed=seed,
            plans=samples,
            renders=renders,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            do_sample=sampling.do_sample,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            prompt_ids=prompt_ids,
            micro_batch_size=micro_batch_size,
            vae_batch_size=vae_batch_size,
            on_step=on_step,
        )


def _meet(on_step: Callable[[], None] | None) -> None:
    if on_step is not None:
        on_step()


def _checked_ids(prompts: int, prompt_ids: Sequence[int] | None, plans: int, renders: int) -> list[int]:
    """`prompt_ids`, or 0..prompts-1. Raises ValueError when the counts do not fit."""
    ids = list(range(prompts)) if prompt_ids is None else list(prompt_ids)
    if len(ids) != prompts or min(plans, renders) < 1:
        raise ValueError(
            f"need one prompt_id per prompt and at least 1 plan and render, got {len(ids)} ids for {prompts} prompts, "
            f"{plans} plans and {renders} renders"
        )
    return ids
