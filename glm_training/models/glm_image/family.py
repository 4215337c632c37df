"""GLM-Image as one object: the AR half that plans, the DiT half that renders, and the way in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
from torch import Tensor, nn

from glm_training.models.family import Family, Sampling
from glm_training.models.few_steps import read_few_steps
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.denoiser import DiTDenoiser
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.loading import ModelLoadError, load_pipeline
from glm_training.models.glm_image.sampling import step_hooks
from glm_training.models.lora import has_lora, merged, save_lora
from glm_training.utils.randomness import normal, uniform
from glm_training.utils.tensor_file import share_files

__all__ = ["GLMImage", "ModelLoadError"]


class GLMImage(Family):
    """A whole GLM-Image. `ar` and `dit` hold the stock modules; nothing is trainable until `set_trainable`."""

    components: ClassVar[tuple[str, ...]] = ("ar", "dit")

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
    ) -> GLMImage:
        """From "tiny", "tiny-random" (random weights from `seed`), a pipeline folder, or a hub id at `revision`.

        Weights in `dtype` on `device`. Raises ModelLoadError, which says what to do.
        """
        pipeline = load_pipeline(
            name_or_path,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            seed=seed,
        )
        family = GLMImage.from_pipeline(pipeline).to(device)
        try:
            family.few_steps = read_few_steps(name_or_path)
        except ValueError as error:
            raise ModelLoadError(str(error)) from error
        return family

    def to_pipeline(self) -> GlmImagePipeline:
        """A stock pipeline over these very modules, adapters included."""
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

    def save_pretrained(self, path: str | Path, *, merge_lora: bool = False) -> None:
        """Write a pipeline folder that the stock `GlmImagePipeline.from_pretrained` loads (safetensors).

        With adapters, ``merge_lora=True`` writes weights with them added and leaves the model in memory as it is;
        without it ValueError is raised, since a stock pipeline would lose them (`lora.save_lora` writes them alone).
        """
        adapted = [module for module in (self.ar.model, self.dit.transformer) if has_lora(module)]
        if adapted and not merge_lora:
            raise ValueError(
                "the model carries LoRA adapters, which a pipeline folder cannot hold: pass merge_lora=True, or write "
                "them alone with glm_training.models.lora.save_lora"
            )
        with ExitStack() as stack:
            for module in adapted:
                stack.enter_context(merged(module))
            self.to_pipeline().save_pretrained(str(path), safe_serialization=True)
        if self.few_steps is not None:
            self.few_steps.write(path)
        share_files(Path(path))

    def save_lora(self, component: str, folder: str | Path) -> None:
        """Write the adapter of a half as a PEFT folder."""
        save_lora(self.module(component), folder)

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

    def denoiser(self, height: int, width: int) -> DiTDenoiser:
        return DiTDenoiser(self.dit, height, width)

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
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """N plans per prompt and M renders per plan: images ``[P * N * M, 3, height, width]`` fp32 in [0, 1].

        Image (p, n, m) lies at ``(p * N + n) * M + m`` (prompt-major) and depends on its prompt and on (seed,
        prompt_ids[p], n, m) alone, not on its neighbours; `prompt_ids` are 0..P-1 unless given. With
        `share_render_noise` render m of every plan of a prompt starts from the same noise, so that plans differ by
        their tokens only. `sources` ``[P, 3, h, w]`` in [0, 1] makes it image-to-image. The defaults are the stock
        pipeline's. At most `micro_batch_size` samples are written and rendered at once (None: all). `on_step` is
        called every few tokens and at each denoising step, and may raise to abandon the drawing.

        Raises ValueError for sizes that are not multiples of 32 px and counts below 1.
        """
        ids = _checked_ids(len(prompts), prompt_ids, plans, renders)
        prompt = self.ar.encode_prompts(list(prompts), height, width, sources)
        plan_names = [(p, n) for p in ids for n in range(plans)]
        draws = uniform(seed, "generate/tokens", plan_names, (prompt.T,), device=self.ar.device)
        token_hook, step_hook = step_hooks(on_step)
        rollout = self.ar.rollout(
            prompt,
            plans,
            draws,
            temperature=temperature,
            top_p=top_p,
            do_sample=do_sample,
            micro_batch_size=micro_batch_size,
            on_step=token_hook,
        )
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
        return self.dit.decode_latents(trajectory.final, micro_batch_size=micro_batch_size or 8)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        seed: int,
        sampling: Sampling,
        samples: int = 1,
        sources: Tensor | None = None,
        prompt_ids: Sequence[int] | None = None,
        micro_batch_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """`generate` with `samples` plans per prompt, rendered once each."""
        return self.generate(
            prompts,
            height=height,
            width=width,
            sources=sources,
            seed=seed,
            plans=samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            do_sample=sampling.do_sample,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            prompt_ids=prompt_ids,
            micro_batch_size=micro_batch_size,
            on_step=on_step,
        )


def _checked_ids(prompts: int, prompt_ids: Sequence[int] | None, plans: int, renders: int) -> list[int]:
    """`prompt_ids`, or 0..prompts-1. Raises ValueError when the counts do not fit."""
    ids = list(range(prompts)) if prompt_ids is None else list(prompt_ids)
    if len(ids) != prompts or min(plans, renders) < 1:
        raise ValueError(
            f"need one prompt_id per prompt and at least 1 plan and render, got {len(ids)} ids for {prompts} prompts, "
            f"{plans} plans and {renders} renders"
        )
    return ids
