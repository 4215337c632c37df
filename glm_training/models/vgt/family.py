"""VGT as one object: its autoencoder and its generator, either of which can be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glm_training.models.denoising import Denoiser
from glm_training.models.family import DECODED_AT_ONCE, Family, Sampling
from glm_training.models.gathering import gathered
from glm_training.models.loading import ModelLoadError
from glm_training.models.prompt_reading import PromptReading
from glm_training.models.run_folders import INDEX, pipeline_in
from glm_training.models.vgt.autoencoder import Autoencoder
from glm_training.models.vgt.generator import Generator
from glm_training.models.vgt.loading import AUTOENCODER, CLASS_NAME, GENERATOR, Hub, Models, Source, load_models
from glm_training.models.vgt.sampling import sample
from glm_training.models.vgt.sequence import random_orders, raster_order
from glm_training.utils.randomness import normal
from glm_training.utils.tensor_file import share_files


class VGT(Family):
    """A VGT; without `generator` it draws what its autoencoder makes of given images.

    Nothing is trainable until `set_trainable`. `teacher`: what the training of the autoencoder distils from, saved with
    it. `encoder_rate_ratio`: learning rate of the vision encoder as a share of the rest's. `queries_see_each_other`: as
    in `sampling.sample`, for measuring what it is worth.
    """

    queries_see_each_other = False

    def __init__(self, models: Models, encoder_rate_ratio: float = 1.0) -> None:
        self.autoencoder, self.generator, self.teacher = models.autoencoder, models.generator, models.teacher
        self.encoder_rate_ratio = encoder_rate_ratio
        self.components = (AUTOENCODER,) if self.generator is None else (AUTOENCODER, GENERATOR)
        if self.generator is not None:
            config = self.autoencoder.config
            self.generator.config.check_autoencoder(config.latent_channels, config.channel_norm, config.stride)
        self.set_trainable()
        self.eval()

    # -- in and out ----------------------------------------------------------------------------------------------------

    @staticmethod
    def load(
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        local_files_only: bool = False,
        seed: int = 0,
        source: Source | None = None,
        encoder_rate_ratio: float = 1.0,
    ) -> VGT:
        """From what `loading.load_models` takes, weights in `dtype` on `device`. Raises ModelLoadError."""
        name, hub = pipeline_in(name_or_path), Hub(revision, local_files_only)
        models = load_models(name, source or Source(), dtype=dtype, hub=hub, seed=seed)
        try:
            return VGT(models, encoder_rate_ratio).to(device)
        except ValueError as error:
            raise ModelLoadError(f"cannot use {name_or_path} as a VGT: {error}") from error

    def to(self, device: torch.device | str) -> VGT:
        super().to(device)
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    def to_pipeline(self) -> Any:
        """Raises ValueError: no library has a pipeline of this kind."""
        raise ValueError("there is no stock pipeline for VGT; save_pretrained writes a folder that VGT.load reads")

    def save_pretrained(self, path: str | Path, *, merge_lora: bool = False) -> None:
        """Writes a folder that `load` reads: model_index.json, `autoencoder` (with its teacher), and `generator`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder.save_pretrained(folder / AUTOENCODER, teacher=self.teacher)
        if self.generator is not None:
            self.generator.save_pretrained(folder / GENERATOR)
        index = {"_class_name": CLASS_NAME} | {name: ["glm_training", name] for name in self.components}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        share_files(folder)

    def pipeline_bytes(self) -> int:
        teacher = 0 if self.teacher is None else sum(p.numel() * p.element_size() for p in self.teacher.parameters())
        return super().pipeline_bytes() + teacher

    def save_lora(self, component: str, folder: str | Path) -> None:
        """Raises ValueError: VGT's models carry no adapters."""
        raise ValueError("VGT's models carry no adapters")

    def load_lora(self, component: str, folder: str | Path) -> None:
        """Raises ValueError: VGT's models carry no adapters."""
        raise ValueError("VGT's models carry no adapters")

    # -- what is trained -----------------------------------------------------------------------------------------------

    def component(self, name: str) -> Autoencoder | Generator:
        self._known(name)
        if name == AUTOENCODER:
            return self.autoencoder
        assert self.generator is not None  # else it is not among the components
        return self.generator

    def module(self, name: str) -> nn.Module:
        return self.component(name)

    def frozen(self) -> list[nn.Module]:
        """The generator's token embeddings, where they are tied to the output layer that is not there."""
        return [] if self.generator is None else self.generator.frozen()

    def rate_scales(self, component: str) -> dict[str, float]:
        """The autoencoder's vision encoder knows pictures already, and learns at `encoder_rate_ratio`."""
        if component != AUTOENCODER or self.encoder_rate_ratio == 1.0:
            return {}
        return dict.fromkeys(self.autoencoder.parameter_groups()["encoder"], self.encoder_rate_ratio)

    def read_prompts(
        self, prompts: Sequence[str], height: int, width: int, mode: Literal["t2i", "i2i"]
    ) -> list[PromptReading]:
        if self.generator is None:
            return [PromptReading() for _ in prompts]
        return self.generator.prompt_text.read(prompts)

    def denoiser(self, height: int, width: int) -> Denoiser:
        """Raises ValueError: each of its tokens has a noise level of its own."""
        raise ValueError("VGT has no noise schedule of whole images")

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        weight = next(self.autoencoder.parameters())
        return self.autoencoder.decode(self.autoencoder.encode(images.to(weight.device, weight.dtype))).clamp(0, 1)

    def own_size(self) -> int:
        """Side of the pictures that what draws was trained on, where they were square."""
        grid = (0, 1) if self.generator is None else self.generator.config.grid
        return grid[0] * self.autoencoder.stride if grid[0] == grid[1] else self.autoencoder.config.image_size

    # -- images --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        """Images of the prompts; of `sources` [P, 3, height, width], without a generator, their reconstructions.

        Image (p, m) depends on its prompt and on (seed, prompt_ids[p], m) alone. At most `micro_batch_size` are drawn
        at once, without it the latents of all; `vae_batch_size` go through the autoencoder together. Raises
        ValueError for sizes that are no multiples of the autoencoder's stride, or that the generator has no places for,
        and for sources beside a generator or neither of the two.
        """
        if (self.generator is None) != (sources is not None):
            raise ValueError(
                "this VGT has an autoencoder alone, which draws given images again: give one with each prompt "
                "(--source of glm-train sample), or name the folder of a generator"
                if sources is None
                else "this VGT has a generator, which draws prompts and no given images: leave those out (--source of "
                "glm-train sample), or name the folder of an autoencoder alone"
            )
        ids = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
        names = [(p, m) for p in ids for m in range(samples)]
        rows = [row // samples for row in range(len(names))]
        decoded = vae_batch_size or micro_batch_size or DECODED_AT_ONCE["vgt"]
        size = (micro_batch_size or len(names)) if sources is None else decoded
        drawn = []
        with ExitStack() as whole:
            for name in self.components:  # which are called in pieces
                whole.enter_context(gathered(self.component(name)))
            for start in range(0, len(names), size):
                some, named = rows[start : start + size], names[start : start + size]
                if sources is not None:
                    latents = self.autoencoder.encode(sources[some])
                else:
                    asked = [prompts[row] for row in some]
                    latents = self._latents(asked, named, (height, width), seed, sampling, on_step)
                for part in latents.split(decoded):
                    drawn.append(self.autoencoder.decode(part).clamp(0, 1))
                    if on_step is not None:
                        on_step()
        return torch.cat(drawn)

    def _latents(
        self,
        prompts: list[str],
        names: list[tuple[int, int]],
        size: tuple[int, int],
        seed: int,
        sampling: Sampling,
        on_step: Callable[[], None] | None,
    ) -> Tensor:
        generator, stride = self.generator, self.autoencoder.stride
        assert generator is not None
        if any(side % stride for side in size):
            raise ValueError(f"images of {size[0]} x {size[1]} px: both sides must be multiples of {stride} px")
        most = generator.config.query_grid * stride
        if max(size) > most:
            raise ValueError(
                f"images of {size[0]} x {size[1]} px: this generator has places for {most} x {most} px at most"
            )
        grid = (size[0] // stride, size[1] // stride)
        places = grid[0] * grid[1]
        shape = (sampling.num_inference_steps, generator.config.latent_channels, *grid)
        raster = generator.config.order == "raster"
        order = raster_order(places) if raster else random_orders(seed, "generate/order", names, places)
        return sample(
            generator,
            generator.encode_prompts(prompts),
            normal(seed, "generate/latents", names, shape, device=generator.device),
            order,
            guidance=sampling.guidance_scale,
            acc_ratio=sampling.parallel,
            queries_see_each_other=self.queries_see_each_other,
            on_group=None if on_step is None else lambda _: on_step(),
        )
