"""SDXL's UNet with the frozen parts around it: from prompts, sizes and noise to pixels.

`UNetComponent.forward`, the prediction at (x_t, t), is the atomic unit: sampling, the DPO errors, the scores of a
distillation and every loss go through it, so what sampled is what is trained.

B rows with latents [C, h, w] (8 px each), images of H x W px.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from glm_training.models.sdxl import latents as codec
from glm_training.models.sdxl import text as prompting
from glm_training.models.sdxl.schedule import NoiseSchedule
from glm_training.models.sdxl.types import SDXLText
from glm_training.utils.randomness import make_generator

_FINE_TIMESTEPS = (torch.float32, torch.float64, torch.int32, torch.int64)


class UNetComponent(torch.nn.Module):
    """The UNet, and VAE, TAESD (or None), both text encoders with their tokenizers, and the scheduler.

    Only `unet` is ever trained: `train()` leaves the rest in evaluation mode. `schedule` is the noise schedule of
    training. Raises ValueError for parts that make no SDXL: an inpainting or refiner UNet, a flow-matching scheduler.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    sharding_units: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_2: PreTrainedTokenizerBase,
        scheduler: Any,
        taesd: AutoencoderTiny | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__()
        check_networks(unet, vae)
        self.schedule = NoiseSchedule(scheduler)
        self.unet = unet
        self.vae = codec.without_overflow(vae)
        self.taesd = taesd
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.scheduler = scheduler
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.one_step_timestep: int | None = None
        for part in self.frozen():
            part.requires_grad_(False).eval()

    # -- setup ---------------------------------------------------------------------------------------------------------

    def sharing(self, unet: UNet2DConditionModel) -> UNetComponent:
        """Another component around `unet` (a frozen copy, a teacher, a second LoRA) with these very frozen parts."""
        return UNetComponent(
            unet, self.vae, self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2, self.scheduler,
            self.taesd, self.force_zeros_for_empty_prompt,
        )  # fmt: skip

    def sample_in_few_steps(self, steps: int, one_step_timestep: int | None = None) -> None:
        """From here on `sample` takes `steps` steps as a distilled UNet does: each makes an image, and the next starts
        from that image with fresh noise on it (`LCMScheduler`, which an exported pipeline then carries).

        `one_step_timestep`: what the UNet is told in a single step, None for the last timestep. A stock pipeline is
        told it by `timesteps=[..]`.
        """
        options: Any = {"original_inference_steps": steps, "clip_sample": False}
        self.scheduler = LCMScheduler.from_config(self.scheduler.config, **options)
        self.one_step_timestep = one_step_timestep

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one image. ValueError unless both sides are positive multiples of 8 px."""
        scale = self.latent_scale
        if min(height, width) < scale or height % scale or width % scale:
            raise ValueError(f"height and width must be positive multiples of {scale} px, got {height} x {width}")
        return self.unet.config["in_channels"], height // scale, width // scale

    def train(self, mode: bool = True) -> UNetComponent:
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in backward instead of keeping its activations; the gradients stay the same."""
        self.unet.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep the activations again."""
        self.unet.disable_gradient_checkpointing()

    def frozen(self) -> list[torch.nn.Module]:
        """What is never trained: VAE, TAESD and both text encoders."""
        parts = (self.vae, self.taesd, self.text_encoder, self.text_encoder_2)
        return [part for part in parts if part is not None]

    # -- conditions ----------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> SDXLText:
        """The B prompts through both text encoders, as the stock pipeline does it; see `text.encode_prompts`."""
        return prompting.encode_prompts(
            prompts, (self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2)
        )

    def negative_text(self, text: SDXLText, prompt: str | None = None) -> SDXLText:
        """What classifier-free guidance leads away from, for the rows of `text`: `prompt` for each.

        Without one it is zeros, or the empty prompt for models with force_zeros_for_empty_prompt off, as in the stock.
        """
        if prompt is None and self.force_zeros_for_empty_prompt:
            return text.zeros()
        encoded = self.encode_prompts([prompt or ""]).to(text.pooled.device)
        return encoded.repeat_interleave(len(text))

    # -- prediction, the atomic unit -----------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: SDXLText,
        time_ids: Tensor,
        *,
        guidance_scale: float = 1.0,
        negative: SDXLText | None = None,
    ) -> Tensor:
        """The noise, or v (`schedule.prediction`), in noised `latents` x_t: ``[B, C, h, w]``, returned in fp32.

        `timestep` ``[B]`` in [0, 999], fp32 or integers (never half precision, which rounds 999 to 1000). `time_ids`
        ``[B, 6]`` from `add_time_ids`. `guidance_scale` s > 1 gives u + s (c - u) with u under `negative`
        (`negative_text(text)` unless given), both in one batch of 2 B; at 1 and below there is no guidance, as in the
        stock pipeline.

        Raises ValueError for shapes or dtypes that do not fit.
        """
        self._check_inputs(latents, timestep, text, time_ids)
        if guidance_scale <= 1.0:
            return self._predict(latents, timestep, text, time_ids)
        if negative is None:
            negative = self.negative_text(text)
        doubled = (torch.cat([tensor, tensor]) for tensor in (latents, timestep, time_ids))
        both_latents, both_steps, both_ids = doubled
        both = self._predict(both_latents, both_steps, SDXLText.cat([negative, text]), both_ids)
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _predict(self, latents: Tensor, timestep: Tensor, text: SDXLText, time_ids: Tensor) -> Tensor:
        """One call of the UNet. Time and sizes go in as fp32: the UNet embeds them before it casts."""
        dtype, device = self.unet.conv_in.weight.dtype, latents.device
        added = {"text_embeds": text.pooled.to(device, dtype), "time_ids": time_ids.to(device, torch.float32)}
        (prediction,) = self.unet(
            latents.to(dtype),
            timestep.to(device),
            encoder_hidden_states=text.prompt_embeds.to(device, dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return prediction.float()

    def _check_inputs(self, latents: Tensor, timestep: Tensor, text: SDXLText, time_ids: Tensor) -> None:
        batch, channels = len(latents), self.unet.config["in_channels"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be [B, {channels}, h, w], got {list(latents.shape)}")
        if timestep.shape != (batch,) or timestep.dtype not in _FINE_TIMESTEPS:
            raise ValueError(
                f"timestep must be [{batch}] in fp32 or integers, got {timestep.dtype} {list(timestep.shape)}"
            )
        if len(text) != batch or time_ids.shape != (batch, 6):
            raise ValueError(
                f"text and time_ids must have {batch} rows of latents, time_ids 6 columns; got {len(text)} rows of "
                f"text and time_ids {list(time_ids.shape)}"
            )

    # -- sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        text: SDXLText,
        time_ids: Tensor,
        *,
        steps: int,
        guidance_scale: float = 5.0,
        negative: SDXLText | None = None,
        generators: Sequence[torch.Generator] | None = None,
        micro_batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents ``[B, C, h, w]`` fp32 that `steps` steps of the scheduler make of standard normal `noise`.

        The stock pipeline's loop with its scheduler, whose state here is left alone. `generators`, one per row, serve
        schedulers that draw noise at each step; without them the draws depend on the row's number alone. At most
        `micro_batch_size` rows at once (None: all). `on_step` is called before each step and may raise.

        Raises FloatingPointError when the result is not finite.
        """
        if negative is None and guidance_scale > 1.0:
            negative = self.negative_text(text)
        if generators is None:
            generators = [make_generator(0, "sdxl/step noise", row) for row in range(len(noise))]
        parts = []
        for start in range(0, len(noise), micro_batch_size or len(noise)):
            rows = slice(start, start + (micro_batch_size or len(noise)))
            part_negative = None if negative is None else negative.select(rows)
            condition = text.select(rows), time_ids[rows], part_negative
            parts.append(self._run(noise[rows], condition, steps, guidance_scale, list(generators[rows]), on_step))
        latents = torch.cat(parts)
        if not bool(torch.isfinite(latents).all()):
            raise FloatingPointError("sampling ended in NaN or infinite latents: the UNet's weights are not finite")
        return latents

    def _run(
        self,
        noise: Tensor,
        condition: tuple[SDXLText, Tensor, SDXLText | None],
        steps: int,
        guidance_scale: float,
        generators: list[torch.Generator],
        on_step: Callable[[int], None] | None,
    ) -> Tensor:
        text, time_ids, negative = condition
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=noise.device)
        if steps == 1 and self.one_step_timestep is not None:
            scheduler.timesteps = torch.tensor([self.one_step_timestep], device=noise.device)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if takes_generator else {}
        latents = noise.float() * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            if on_step is not None:
                on_step(index)
            scaled = scheduler.scale_model_input(latents, timestep)
            times = timestep.to(noise.device).expand(len(noise))
            prediction = self(scaled, times, text, time_ids, guidance_scale=guidance_scale, negative=negative)
            latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
        return latents

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor, *, micro_batch_size: int = 4, noise: Tensor | None = None) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] to latents fp32, without gradient; see `latents.encode_images`."""
        return codec.encode_images(self.vae, images, micro_batch_size, noise)

    def decode_latents(self, latents: Tensor, *, micro_batch_size: int = 4, taesd: bool = False) -> Tensor:
        """Latents to images ``[B, 3, 8h, 8w]`` fp32 in [0, 1], differentiable; see `latents.decode_latents`.

        `taesd` decodes with the small decoder; ValueError when the model was loaded without one.
        """
        if taesd and self.taesd is None:
            raise ValueError("the model was loaded without a TAESD: pass taesd= a folder or madebyollin/taesdxl")
        decoder = self.taesd if taesd and self.taesd is not None else self.vae
        return codec.decode_latents(decoder, latents, micro_batch_size)


def check_networks(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Raise ValueError unless the UNet is conditioned as SDXL's base model is and predicts the VAE's latents."""
    kind = unet.config.get("addition_embed_type")
    if kind != "text_time":
        raise ValueError(f'the UNet has addition_embed_type {kind!r}; an SDXL UNet has "text_time"')
    channels = vae.config["latent_channels"]
    if unet.config["in_channels"] != channels or unet.config["out_channels"] != channels:
        raise ValueError(
            f"the UNet takes {unet.config['in_channels']} channels and the VAE makes {channels}: an inpainting model "
            "cannot be trained here"
        )
    if unet.config.get("time_cond_proj_dim") is not None:
        raise ValueError("the UNet embeds its guidance scale (LCM); a plain SDXL UNet does not")
