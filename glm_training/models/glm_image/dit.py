"""The DiT half of GLM-Image: from prior tokens, quoted words and source images to pixels.

`DiTComponent.forward`, the velocity at (latents, t), is the atomic unit: sampling, replay and every loss go through it,
so what sampled is what is trained. Source images condition through keys and values that are made anew for each call
(once per trajectory when sampling) and keep their gradient. Letters in shapes: `dit_types`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from glm_training.algorithms.flow_sde import Kernel
from glm_training.models.gathering import drawing
from glm_training.models.glm_image import latents as codec
from glm_training.models.glm_image import schedule as timing
from glm_training.models.glm_image.ar_types import EncodedSources, Sources
from glm_training.models.glm_image.attention import (
    Recorder,
    Reference,
    Rotary,
    install_key_mask,
    keys_leave_by_the_side,
)
from glm_training.models.glm_image.conditioning import (
    TOKEN_PIXELS,
    build_condition,
    check_sources,
    check_tokens,
    drop_rows,
    install_prior_drop,
    prior_arguments,
    source_condition,
)
from glm_training.models.glm_image.dit_types import DiTCondition, FlowSchedule, SourceCondition, Trajectory
from glm_training.models.glm_image.glyph import GlyphCache
from glm_training.models.glm_image.sampling import SamplerSettings, Velocity, join_rows, run_prefix, sample_rows

_FINE_TIMESTEPS = (torch.float32, torch.float64, torch.int32, torch.int64)


class DiTComponent(torch.nn.Module):
    """The diffusion transformer with the frozen parts around it: VAE, glyph text encoder and its tokenizer, scheduler.

    Only `transformer` is ever trained: `train()` leaves VAE and text encoder in evaluation mode (ByT5 has dropout).
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    sharding_units: ClassVar[tuple[str, ...]] = ("GlmImageTransformerBlock",)

    def __init__(
        self,
        transformer: GlmImageTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        codec.check_vae(vae)
        timing.check_scheduler(scheduler)
        self.transformer = transformer
        self.vae = vae.requires_grad_(False).eval()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.glyphs = GlyphCache()
        self._rotary: dict[tuple[int, int, torch.device], Rotary] = {}
        install_key_mask(transformer)
        install_prior_drop(transformer)

    # -- setup ---------------------------------------------------------------------------------------------------------

    def sharing(self, transformer: GlmImageTransformer2DModel) -> DiTComponent:
        """Another component around `transformer` (a frozen copy, a teacher) with these very frozen parts."""
        return DiTComponent(transformer, self.vae, self.text_encoder, self.tokenizer, self.scheduler)

    @property
    def device(self) -> torch.device:
        return self.transformer.image_projector.proj.weight.device

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one image. ValueError unless both sides are positive multiples of 32 px."""
        self._patches(height, width)
        return self.transformer.config["in_channels"], height // self.latent_scale, width // self.latent_scale

    def train(self, mode: bool = True) -> DiTComponent:
        super().train(mode)
        self.vae.eval()
        self.text_encoder.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in backward instead of keeping its activations; the gradients stay the same."""
        self.transformer.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep the activations again."""
        self.transformer.disable_gradient_checkpointing()

    # -- conditions ----------------------------------------------------------------------------------------------------

    def condition(
        self,
        prompts: Sequence[str],
        prior_tokens: Tensor,
        grid: tuple[int, int],
        sources: Sources | None = None,
        source_tokens: Tensor | None = None,
        source_grid: tuple[int, int] | None = None,
    ) -> DiTCondition:
        """What B images are conditioned on.

        `prior_tokens` ``[B, rows * columns]``, the AR half's large raster of `grid` (rows, columns). `prompts` has P
        entries and B is a multiple of P: rows are prompt-major, B / P plans each. Image-to-image needs `sources`
        ``[P, 3, H, W]`` in [0, 1] with sides in multiples of 32 px and `source_tokens` ``[P, h * w]``, their VQ codes;
        `source_grid` (h, w) is (H / 32, W / 32) and may be left out. `EncodedSources` bring all of that.

        Raises ValueError for wrong shapes, or for ids outside the codebook (end and reserved ids are not images).
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be a non-empty list of strings, got {prompts!r}")
        check_tokens("prior_tokens", prior_tokens, grid, self._codebook)
        source = self._source_condition(len(prompts), sources, source_tokens, source_grid)
        glyph, mask = self.glyphs.embed(prompts, self.text_encoder, self.tokenizer, self.device)
        return build_condition(prior_tokens.to(self.device), grid, glyph, mask, source)

    def drop_condition(self, condition: DiTCondition, drop: Tensor) -> DiTCondition:
        """Turn the rows where `drop` ``[B]`` bool is True into the unconditional branch of classifier-free guidance.

        All of it, as in sampling: prior tokens dropped, the glyph text "", no source. For training with condition
        dropout; `prior_drop` of `forward` drops the prior tokens alone.
        """
        empty, _ = self.glyphs.embed([""], self.text_encoder, self.tokenizer, self.device)
        return drop_rows(condition, drop, empty)

    def _source_condition(
        self, prompts: int, sources: Sources | None, tokens: Tensor | None, grid: tuple[int, int] | None
    ) -> SourceCondition | None:
        if sources is None and tokens is None:
            return None
        if not isinstance(sources, EncodedSources):
            if sources is None or tokens is None:
                raise ValueError("image-to-image needs sources and source_tokens together")
            height, width = sources.shape[-2:]
            grid = grid or (height // TOKEN_PIXELS, width // TOKEN_PIXELS)
            check_sources(prompts, sources, tokens, grid, self._codebook)
            sources = EncodedSources(tokens, grid, self.encode_images(sources))
        return source_condition(prompts, sources, self._codebook, self.device)

    @property
    def _codebook(self) -> int:
        return self.transformer.config["prior_vq_quantizer_codebook_size"]

    # -- velocity, the atomic unit -------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        condition: DiTCondition,
        *,
        guidance_scale: float = 1.0,
        prior_drop: Tensor | None = None,
        reference: Reference | None = None,
    ) -> Tensor:
        """Velocity d x / d sigma ``[B, C, h, w]`` fp32 at `latents` ``[B, C, h, w]``.

        `timestep` ``[B]``: whole numbers in [0, 999] as in `FlowSchedule.timesteps`, in fp32 or integers (never bf16,
        which rounds 999 to 1000). `guidance_scale` s != 1 gives u + s (c - u), where u sees neither prior tokens nor
        quoted words nor sources. `prior_drop` ``[B]`` bool zeroes the prior tokens of a row. `reference` are the source
        keys of `reference_keys`, computed here when the condition has sources and none are given.

        Raises ValueError for shapes or dtypes that do not fit the condition.
        """
        self._check_inputs(latents, timestep, condition)
        if reference is None and condition.source is not None:
            reference = self.reference_keys(condition.source)
        nothing = torch.zeros(condition.batch_size, dtype=torch.bool, device=latents.device)
        dropped = nothing if condition.dropped is None else condition.dropped
        mask = self._key_mask(condition, dropped, reference)
        if prior_drop is not None:
            dropped = dropped | prior_drop.to(dropped.device)
        conditional = self._transform(latents, timestep, condition, condition.glyph, dropped, mask, reference)
        if guidance_scale == 1.0:
            return conditional
        empty, _ = self.glyphs.embed([""], self.text_encoder, self.tokenizer, self.device)
        empty = empty.to(latents.device).expand(condition.batch_size, -1, -1)
        unconditional = self._transform(latents, timestep, condition, empty, ~nothing, None, None)
        return unconditional + guidance_scale * (conditional - unconditional)

    def reference_keys(self, source: SourceCondition) -> Reference:
        """Keys and values of the source images for all layers: a pass at t = 0 without text, one row per source.

        With gradient when gradients are on. Valid as long as the transformer's weights do not change.
        """
        transformer, layers = self.transformer, len(self.transformer.transformer_blocks)
        recorder = Recorder(layers)
        (count, _, height, width), device = source.latents.shape, source.latents.device
        dtype = transformer.image_projector.proj.weight.dtype
        size = torch.tensor([[height, width]], device=device) * self.latent_scale
        no_text = source.latents.new_zeros(count, 0, transformer.config["text_embed_dim"], dtype=dtype)
        with keys_leave_by_the_side(transformer):
            transformer(
                hidden_states=source.latents.to(dtype),
                encoder_hidden_states=no_text,
                **prior_arguments(source.prior_tokens, source.grid),
                timestep=torch.zeros(count, dtype=torch.int64, device=device),
                target_size=size.expand(count, -1),
                crop_coords=size.new_zeros(count, 2),
                image_rotary_emb=self._rotary_for(source.latents),
                kv_caches=recorder,
                return_dict=False,
            )
        return Reference(recorder, layers).for_rows(source.rows)

    def _transform(
        self,
        latents: Tensor,
        timestep: Tensor,
        condition: DiTCondition,
        glyph: Tensor,
        dropped: Tensor,
        mask: Tensor | None,
        reference: Reference | None,
    ) -> Tensor:
        """One call of the transformer. Time and sizes go in as integers: exact, and no wrapper casts those to bf16."""
        dtype = self.transformer.image_projector.proj.weight.dtype
        size = torch.tensor([[condition.height, condition.width]], device=latents.device)
        (velocity,) = self.transformer(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=glyph.to(dtype),
            **prior_arguments(condition.prior_tokens, condition.grid, dropped),
            timestep=timestep.to(torch.int64),
            target_size=size.expand(len(latents), -1),
            crop_coords=size.new_zeros(len(latents), 2),
            attention_mask=mask,
            image_rotary_emb=self._rotary_for(latents),
            kv_caches=reference,
            return_dict=False,
        )
        # no view: FSDP's hook on what a module returns would be lost with a change of it
        return velocity.float().clone()

    def _key_mask(self, condition: DiTCondition, dropped: Tensor, reference: Reference | None) -> Tensor | None:
        """``[B, reference + text + image]`` bool, or None when every key counts (then attention is the stock one's)."""
        hides_source = reference is not None and bool(dropped.any())
        if not hides_source and bool(condition.glyph_mask.all()):
            return None
        patches = 4 * condition.grid[0] * condition.grid[1]
        parts = [condition.glyph_mask, condition.glyph_mask.new_ones(condition.batch_size, patches)]
        if reference is not None:
            parts.insert(0, (~dropped)[:, None].expand(-1, reference.tokens))
        return torch.cat(parts, dim=1)

    def _rotary_for(self, latents: Tensor) -> Rotary:
        """Rotary angles for latents ``[.., h, w]``, kept on their device (the stock rebuilds them per call)."""
        key = (latents.shape[-2], latents.shape[-1], latents.device)
        if key not in self._rotary:
            if len(self._rotary) >= 16:
                self._rotary.clear()
            # kept for later calls: a backward pass cannot keep tensors of inference mode
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = self.transformer.rope(latents)
                self._rotary[key] = Rotary(cos.to(latents.device), sin.to(latents.device))
        return self._rotary[key]

    def _check_inputs(self, latents: Tensor, timestep: Tensor, condition: DiTCondition) -> None:
        scale, channels = self.latent_scale, self.transformer.config["in_channels"]
        wanted = (condition.batch_size, channels, condition.height // scale, condition.width // scale)
        if tuple(latents.shape) != wanted:
            raise ValueError(f"latents must be {list(wanted)} for this condition, got {list(latents.shape)}")
        if timestep.shape != (len(latents),) or timestep.dtype not in _FINE_TIMESTEPS:
            raise ValueError(
                f"timestep must be [{len(latents)}] in fp32 or integers, got {timestep.dtype} {list(timestep.shape)}; "
                "under FSDP mixed precision set cast_forward_inputs=False"
            )
        if timestep.is_floating_point() and not bool((timestep == timestep.trunc()).all()):
            raise ValueError("timestep must be whole numbers, as `schedule` and `training_sigmas` give them")

    # -- sampling ------------------------------------------------------------------------------------------------------

    def schedule(self, steps: int, height: int, width: int) -> FlowSchedule:
        """The stock pipeline's `steps` steps for an image of `height` x `width` px. ValueError outside [1, 1000]."""
        return timing.flow_schedule(self.scheduler, steps, self._patches(height, width))

    def training_sigmas(self, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """`u` ``[B]`` in [0, 1] -> (timestep, sigma) ``[B]`` fp32: k - 1 and shift(k / 1000), k = ceil(1000 u)."""
        return timing.training_sigmas(self.scheduler, u, self._patches(height, width))

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: DiTCondition,
        schedule: FlowSchedule,
        *,
        guidance_scale: float,
        kernel: Kernel = "ode",
        eta: float = 0.7,
        sde_indices: Sequence[int] = (),
        step_noise: Tensor | None = None,
        store: bool = False,
        keep_means: bool = False,
        branches: int = 1,
        micro_batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """Denoise `noise` ``[B, C, h, w]`` along `schedule`, without gradient, latents in fp32.

        Steps in `sde_indices` draw from `kernel` with strength `eta` and `step_noise`
        ``[len(sde_indices), B, C, h, w]``; the others follow the ODE. ``store=True`` keeps the latents on both sides of
        each SDE step, for a replay, and `keep_means` the means of their Gaussians. With `branches` = M every M rows in
        a row share their start (noise and condition of the first of them) and part at the first SDE step: the steps
        before it are computed once for all of them. At most `micro_batch_size` rows go through the transformer at
        once; a row does not depend on the rows next to it. `on_step` is called before each step of each micro-batch; it
        may raise to abandon the sampling.

        Raises ValueError for indices, shapes or kernels that do not fit, FloatingPointError for a non-finite result.
        """
        settings = SamplerSettings(schedule, guidance_scale, kernel, eta, tuple(sde_indices), store, keep_means)
        settings.check(noise, step_noise)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        rows_at_once = micro_batch_size or max(len(noise), 1)
        if branches < 1 or len(noise) % branches or (branches > 1 and not settings.sde_indices):
            raise ValueError(f"{branches} branches need SDE steps and divide the rows, got {len(noise)} rows")
        parts, training = [], self.transformer.training
        self.transformer.eval()  # LoRA dropout off
        first = settings.sde_indices[0] if branches > 1 else 0
        try:
            with drawing(self, self.transformer.transformer_blocks) as turns:
                on_step = on_step if turns is None else turns.asking(on_step)
                if branches > 1:
                    noise = self._prefix(noise[::branches], condition, settings, first, rows_at_once, on_step)
                    noise = noise.repeat_interleave(branches, dim=0)
                for rows in torch.arange(len(noise), device=self.device).split(rows_at_once):
                    part = condition if len(rows) == len(noise) else condition.select(rows)
                    drawn = None if step_noise is None else step_noise[:, rows.to(step_noise.device)]
                    start = noise[rows.to(noise.device)].to(self.device)
                    velocity = self._velocity_of(part, guidance_scale)
                    parts.append(sample_rows(velocity, start, part, settings, drawn, on_step, first))
        finally:
            self.transformer.train(training)
        return join_rows(parts, condition)

    def _prefix(
        self,
        noise: Tensor,
        condition: DiTCondition,
        settings: SamplerSettings,
        stop: int,
        rows_at_once: int,
        on_step: Callable[[int], None] | None,
    ) -> Tensor:
        """Latents before step `stop`, of the first row of every branch."""
        branches = condition.batch_size // len(noise)
        done = []
        for rows in torch.arange(len(noise), device=self.device).split(rows_at_once):
            velocity = self._velocity_of(condition.select(rows * branches), settings.guidance_scale)
            start = noise[rows.to(noise.device)].to(self.device)
            done.append(run_prefix(velocity, start, settings.schedule, stop, on_step))
        return torch.cat(done)

    def _velocity_of(self, condition: DiTCondition, guidance_scale: float) -> Velocity:
        """The velocity under one condition, its source keys made once for all steps."""
        reference = None if condition.source is None else self.reference_keys(condition.source)

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            times = timing.schedule_tensor(timestep, len(latents), latents.device)
            return self(latents, times, condition, guidance_scale=guidance_scale, reference=reference)

        return velocity

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor, *, micro_batch_size: int = 8) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] to normalised latents ``[B, C, H/8, W/8]`` fp32, without gradient."""
        return codec.encode_images(self.vae, images, micro_batch_size)

    def decode_latents(self, latents: Tensor, *, micro_batch_size: int = 8) -> Tensor:
        """Normalised latents ``[B, C, h, w]`` to images ``[B, 3, 8h, 8w]`` fp32 in [0, 1]; differentiable."""
        return codec.decode_latents(self.vae, latents, micro_batch_size)

    def _patches(self, height: int, width: int) -> int:
        if height < TOKEN_PIXELS or width < TOKEN_PIXELS or height % TOKEN_PIXELS or width % TOKEN_PIXELS:
            raise ValueError(f"height and width must be multiples of {TOKEN_PIXELS} px, got {height}x{width}")
        side = self.latent_scale * self.transformer.config["patch_size"]
        return (height // side) * (width // side)
