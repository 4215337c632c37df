"""What supervised training teaches each family of target images: a batch as its parts read it, and their losses.

B images of H x W px: latents [C, h, w], T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from glm_training.algorithms.flow_matching import sample_timestep_density
from glm_training.config import Config
from glm_training.data import Batch
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.encoding.batches import encoded_sources, sdxl_text, target_rows
from glm_training.engine.families import Condition
from glm_training.engine.parts import Part
from glm_training.engine.validation import LEVELS
from glm_training.methods.losses import MethodLoss
from glm_training.methods.preference import DiffusionFinetuning
from glm_training.methods.supervised import FlowMatching, TokenCrossEntropy
from glm_training.models.denoising import Denoiser
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.types import UNetCondition, add_time_ids
from glm_training.utils.randomness import normal, uniform


@dataclass
class EncodedBatch:
    """B images as their losses read them; `names` of the random draws of each.

    clean: [B, C, h, w] fp32 latents with the condition of each, where a part denoises. tokens: [B, T] long, what the AR
    half writes for these images, with its prompt, where it is trained.
    """

    names: list[tuple[int, ...]]
    clean: Tensor | None = None
    condition: Condition | None = None
    tokens: Tensor | None = None
    prompt: ARPrompt | None = None


class SupervisedTerms(ABC):
    """The losses of a family's parts. Draws are named by an image's place in the run's sequence of samples."""

    def __init__(self, config: Config, family: Any, encoding: Encoding) -> None:
        self.config = config
        self.family = family
        self.encoding = encoding

    @abstractmethod
    def encode(self, batch: Batch, positions: Sequence[int]) -> EncodedBatch:
        """The batch as its losses read it, on the device."""

    @abstractmethod
    def loss(self, part: Part, batch: EncodedBatch) -> MethodLoss:
        """The term of one part."""

    @abstractmethod
    def judge(self, parts: Mapping[str, Part], batch: Batch, seed: int) -> Iterator[dict[str, Tensor]]:
        """Losses [B] by name of a batch whose places in the data name its noise, some several times: at one level of
        each quarter of the schedule."""

    def _draws(self, names: Sequence[tuple[int, ...]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Levels u [B] in [0, 1), and [B] bool: which are trained without their condition."""
        training = self.config.training
        draws = uniform(self.config.seed, "supervised/level", names, (2,), device=device)
        return sample_timestep_density(draws[:, 0], training.timestep_density), draws[:, 1] < training.prior_dropout

    def _noise(self, batch: EncodedBatch) -> Tensor:
        assert batch.clean is not None
        shape = tuple(batch.clean.shape[1:])
        return normal(self.config.seed, "supervised/noise", batch.names, shape, device=batch.clean.device)

    def _judge_levels(
        self, part: Part, denoiser: Denoiser, batch: EncodedBatch, seed: int
    ) -> Iterator[dict[str, Tensor]]:
        """The error of the part that denoises, at one level of each quarter."""
        clean = batch.clean
        assert clean is not None
        finetuning = DiffusionFinetuning(denoiser)
        for level in range(LEVELS):
            names = [(*name, level) for name in batch.names]
            u = (level + uniform(seed, "supervised/held-out level", names, (1,))[:, 0]) / LEVELS
            noise = normal(seed, "supervised/held-out noise", names, tuple(clean.shape[1:]), device=clean.device)
            levels = denoiser.levels(u).to(clean.device)
            term = finetuning.loss(part.component, clean, batch.condition, noise=noise, levels=levels)
            yield {f"{part.name}/loss": term.each["loss"]}


class GLMTerms(SupervisedTerms):
    """Cross-entropy of the AR half on the target's tokens; flow matching of the DiT half under those tokens."""

    family: GLMImage

    def __init__(self, config: Config, family: GLMImage, encoding: Encoding) -> None:
        super().__init__(config, family, encoding)
        training = config.training
        self.tokens = TokenCrossEntropy(training.preview_loss_weight, training.large_loss_weight)
        self.flow = FlowMatching()

    @torch.no_grad()
    def encode(self, batch: Batch, positions: Sequence[int]) -> EncodedBatch:
        device, (height, width) = self.encoding.world.device, batch.size  # a half that is not trained may be asleep
        images = self.encoding.shown(batch.target_views, target_rows(batch))
        tokens, sources = images["tokens"].to(device), encoded_sources(self.encoding, batch)
        encoded = EncodedBatch([(position,) for position in positions], tokens=tokens)
        if "ar" in self.config.parts():
            encoded.prompt = self.family.ar.encode_prompts(batch.prompts, height, width, sources)
        if "dit" in self.config.parts():
            rows, columns = self.family.ar.grids(height, width, self.config.training.mode)[-1]
            encoded.clean = images["latents"].to(device)
            encoded.condition = self.family.dit.condition(
                batch.prompts, tokens[:, -rows * columns :], (rows, columns), sources
            )
        return encoded

    def loss(self, part: Part, batch: EncodedBatch) -> MethodLoss:
        if part.name == "ar":
            return self.tokens.loss(part.policy, batch.prompt, batch.tokens)  # type: ignore[arg-type]
        clean, condition = batch.clean, cast(DiTCondition, batch.condition)
        assert clean is not None
        u, drop = self._draws(batch.names, clean.device)
        return self.flow.loss(part.policy, self.family.dit, clean, condition, noise=self._noise(batch), u=u, drop=drop)

    def judge(self, parts: Mapping[str, Part], batch: Batch, seed: int) -> Iterator[dict[str, Tensor]]:
        encoded = self.encode(batch, batch.indices)
        if "ar" in parts:
            term = self.tokens.loss(parts["ar"].component, encoded.prompt, encoded.tokens)  # type: ignore[arg-type]
            yield {"ar/loss": term.each["loss"]}
        if "dit" in parts:
            yield from self._judge_levels(parts["dit"], self.family.denoiser(*batch.size), encoded, seed)


class UNetTerms(SupervisedTerms):
    """Squared error of what SDXL's UNet predicts, under the prompt and the picture's own size and crop."""

    family: SDXL

    def encode(self, batch: Batch, positions: Sequence[int]) -> EncodedBatch:
        names: list[tuple[int, ...]] = [(position,) for position in positions]
        return self._encoded(batch, names, self._draws(names)[1].tolist())

    @torch.no_grad()
    def _encoded(self, batch: Batch, names: list[tuple[int, ...]], dropped: list[bool]) -> EncodedBatch:
        unet = self.family.unet
        device = unet.device
        images = self.encoding.shown(batch.target_views, target_rows(batch))
        text = sdxl_text(self.encoding, unet, batch.prompts, dropped, device)
        ids = add_time_ids(images["original_sizes"], images["crops"], batch.size, rows=len(names))
        return EncodedBatch(names, images["latents"].to(device), UNetCondition(text, ids.to(device)))

    def loss(self, part: Part, batch: EncodedBatch) -> MethodLoss:
        clean = batch.clean
        assert clean is not None
        denoiser = self.family.denoiser(*clean.shape[-2:])  # the same levels at every size
        levels = denoiser.levels(self._draws(batch.names)[0]).to(clean.device)
        finetuning = DiffusionFinetuning(denoiser, self.config.training.min_snr_gamma)
        term = finetuning.loss(part.policy, clean, batch.condition, noise=self._noise(batch), levels=levels)
        return replace(term, metrics={"error": term.metrics["chosen_error"]})

    def judge(self, parts: Mapping[str, Part], batch: Batch, seed: int) -> Iterator[dict[str, Tensor]]:
        names: list[tuple[int, ...]] = [(index,) for index in batch.indices]
        encoded = self._encoded(batch, names, [False] * len(names))
        yield from self._judge_levels(parts["unet"], self.family.denoiser(*batch.size), encoded, seed)


TERMS: dict[str, Callable[..., SupervisedTerms]] = {"glm_image": GLMTerms, "sdxl": UNetTerms}
"""By `model.family`: what target images teach it."""
