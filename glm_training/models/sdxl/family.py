"""SDXL as one object: its UNet component, and the way in and out of diffusers' formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor, nn

from glm_training.models.family import DECODED_AT_ONCE, Family, FewSteps, Sampling, read_few_steps
from glm_training.models.gathering import gathered
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import ADAPTER, adapter_parameters, described, has_lora, load_lora
from glm_training.models.prompt_reading import PromptReading
from glm_training.models.run_folders import pipeline_in
from glm_training.models.sdxl.denoiser import UNetDenoiser
from glm_training.models.sdxl.latents import decode_latents, encode_images
from glm_training.models.sdxl.loading import TAESD_FOLDER, load_pipeline, load_taesd, taesd_in
from glm_training.models.sdxl.text import PromptReader
from glm_training.models.sdxl.types import add_time_ids
from glm_training.models.sdxl.unet import UNetComponent
from glm_training.utils.randomness import make_generator, normal
from glm_training.utils.tensor_file import write_tensor_file

__all__ = ["ModelLoadError", "SDXL", "save_lora_for_diffusers"]


LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name diffusers gives an adapter's file."""


class SDXL(Family):
    """A whole SDXL. `unet` is the component that is trained; nothing is trainable until `set_trainable`."""

    components: tuple[str, ...] = ("unet",)

    def __init__(self, unet: UNetComponent) -> None:
        self.unet = unet
        self.set_trainable()
        self.eval()

    # -- in and out ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionXLPipeline, taesd: AutoencoderTiny | None = None) -> SDXL:
        """Around the modules of a stock pipeline, which they go on sharing. ValueError for one that is no base SDXL."""
        parts = pipeline.components
        return cls(
            UNetComponent(
                parts["unet"], parts["vae"], parts["text_encoder"], parts["text_encoder_2"], parts["tokenizer"],
                parts["tokenizer_2"], parts["scheduler"], taesd, bool(pipeline.config["force_zeros_for_empty_prompt"]),
            )
        )  # fmt: skip

    @staticmethod
    def load(
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        local_files_only: bool = False,
        seed: int = 0,
        taesd: str | Path | None = None,
    ) -> SDXL:
        """From "tiny-random" (random weights from `seed`), a diffusers folder or a checkpoint with one, or a hub id at
        `revision`.

        `taesd` is where the small decoder comes from: "tiny-random", a folder or a hub id; without it, the one that
        lies in the folder, if any. Weights in `dtype` on `device`, a VAE that overflows in fp16 in fp32. Raises
        ModelLoadError, which says what to do.
        """
        source = pipeline_in(name_or_path)
        pipeline = load_pipeline(source, dtype=dtype, revision=revision, local_files_only=local_files_only, seed=seed)
        small = taesd if taesd is not None else taesd_in(source)
        decoder = None
        if small is not None:
            decoder = load_taesd(small, dtype=dtype, local_files_only=local_files_only, seed=seed)
        try:
            family, few_steps = SDXL.from_pipeline(pipeline, decoder).to(device), read_few_steps(source)
            if few_steps is not None:
                family.draw_in_few_steps(few_steps)
            return family
        except ValueError as error:
            raise ModelLoadError(f"cannot use {name_or_path} as an SDXL: {error}") from error

    def to_pipeline(self) -> StableDiffusionXLPipeline:
        """A stock pipeline over these very modules, adapters included.

        In fp16 its VAE is in fp32 while the rest is not; what `save_pretrained` writes loads in any one dtype.
        """
        part = self.unet
        modules: dict[str, Any] = {
            "vae": part.vae,
            "text_encoder": part.text_encoder,
            "text_encoder_2": part.text_encoder_2,
            "tokenizer": part.tokenizer,
            "tokenizer_2": part.tokenizer_2,
            "unet": part.unet,
            "scheduler": part.scheduler,
        }
        return StableDiffusionXLPipeline(
            **modules, force_zeros_for_empty_prompt=part.force_zeros_for_empty_prompt, add_watermarker=False
        )

    def save_beside(self, folder: Path) -> None:
        """TAESD goes into its folder "taesd", where `load` finds it again."""
        if self.unet.taesd is not None:
            self.unet.taesd.save_pretrained(str(folder / TAESD_FOLDER), safe_serialization=True)

    def draw_in_few_steps(self, few_steps: FewSteps) -> None:
        super().draw_in_few_steps(few_steps)
        self.unet.sample_in_few_steps(few_steps.steps, few_steps.one_step_timestep)

    def save_lora(self, component: str, folder: str | Path) -> None:
        """Write the adapter alone as `pytorch_lora_weights.safetensors`, which a stock `load_lora_weights` takes.

        Rank and alpha go with it in the file's metadata, which diffusers reads: the adapter comes back at its full
        strength. Raises ValueError when there is none.
        """
        save_lora_for_diffusers(self.module(component), folder)

    def load_lora(self, component: str, folder: str | Path) -> None:
        """Add an adapter that `save_lora`, diffusers' `save_lora_weights` or PEFT wrote for the UNet.

        Raises FileNotFoundError when the folder holds none, ValueError when it does not fit or one is there already.
        """
        module = self.module(component)
        if has_lora(module):
            raise ValueError("the model carries LoRA adapters already")
        if not (Path(folder) / LORA_FILE).is_file():
            if not (Path(folder) / "adapter_config.json").is_file():
                raise FileNotFoundError(f"{folder} holds no {LORA_FILE}")
            load_lora(module, folder)
            return
        try:
            module.load_lora_adapter(str(folder), prefix="unet", weight_name=LORA_FILE, adapter_name=ADAPTER)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise ValueError(f"the adapter in {folder} does not fit the model: {str(error)[:300]}") from error

    # -- what is trained -----------------------------------------------------------------------------------------------

    def component(self, name: str) -> UNetComponent:
        self._known(name)
        return self.unet

    def module(self, name: str) -> UNet2DConditionModel:
        self._known(name)
        return self.unet.unet

    def frozen(self) -> list[nn.Module]:
        """VAE, TAESD and both text encoders."""
        return self.unet.frozen()

    def read_prompts(
        self, prompts: Sequence[str], height: int, width: int, mode: Literal["t2i", "i2i"]
    ) -> list[PromptReading]:
        return PromptReader((self.unet.tokenizer, self.unet.tokenizer_2)).read(prompts, height, width, mode)

    def denoiser(self, height: int, width: int) -> UNetDenoiser:
        """The noise levels, the same at every size."""
        return UNetDenoiser(self.unet.schedule, self.unet.one_step_timestep)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        return decode_latents(self.unet.vae, encode_images(self.unet.vae, images, len(images)), len(images))

    def own_size(self) -> int:
        return self.unet.unet.config["sample_size"] * self.unet.latent_scale

    # -- images --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        seed: int,
        renders: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: str | None = None,
        prompt_ids: Sequence[int] | None = None,
        micro_batch_size: int | None = None,
        vae_batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """M images per prompt ``[P * M, 3, height, width]`` fp32 in [0, 1], prompt-major.

        Image (p, m) depends on its prompt and on (seed, prompt_ids[p], m) alone, not on its neighbours; `prompt_ids`
        are 0..P-1 unless given. The defaults are the stock pipeline's, and so is the micro-conditioning: uncropped, at
        the size drawn. `negative_prompt` as in `UNetComponent.negative_text`; `vae_batch_size` pictures are
        decoded at once (None: `micro_batch_size`, or `DECODED_AT_ONCE`); the rest as in `UNetComponent.sample`.

        Raises ValueError for sizes that are not multiples of 8 px and counts that do not fit.
        """
        ids = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
        if len(ids) != len(prompts) or renders < 1:
            raise ValueError(f"need one prompt_id per prompt and renders >= 1, got {len(ids)} ids, {renders} renders")
        component = self.unet
        names = [(p, m) for p in ids for m in range(renders)]
        noise = normal(seed, "generate/latents", names, component.latent_shape(height, width), component.device)
        text = component.encode_prompts(prompts).repeat_interleave(renders)
        with gathered(component):
            latents = component.sample(
                noise,
                text,
                add_time_ids((height, width), (0, 0), (height, width), rows=len(names)).to(component.device),
                steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative=component.negative_text(text, negative_prompt) if guidance_scale > 1.0 else None,
                generators=[make_generator(seed, "generate/steps", *name) for name in names],
                micro_batch_size=micro_batch_size,
                on_step=on_step,
            )
        return component.decode_latents(
            latents, micro_batch_size=vae_batch_size or micro_batch_size or DECODED_AT_ONCE["sdxl"]
        )

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
        vae_batch_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """`generate` with `samples` renders per prompt. ValueError for `sources`, which SDXL cannot edit."""
        if sources is not None:
            raise ValueError("SDXL draws from text alone and cannot edit source images")
        return self.generate(
            prompts,
            height=height,
            width=width,
            seed=seed,
            renders=samples,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            prompt_ids=prompt_ids,
            micro_batch_size=micro_batch_size,
            vae_batch_size=vae_batch_size,
            on_step=None if on_step is None else lambda _: on_step(),
        )


def save_lora_for_diffusers(unet: nn.Module, folder: str | Path) -> None:
    """Write the adapter of an SDXL UNet for a stock `load_lora_weights`; see `SDXL.save_lora`."""
    if not has_lora(unet):
        raise ValueError("the model carries no LoRA adapters")
    weights = {
        f"unet.{name.replace(f'.{ADAPTER}.', '.')}": param.detach() for name, param in adapter_parameters(unet).items()
    }
    config: Any = unet.peft_config
    told = {f"unet.{key}": value for key, value in described(config[ADAPTER]).items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(told, indent=2, sort_keys=True)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensor_file(Path(folder) / LORA_FILE, weights, metadata)
