"""VGT's generator: a language model that writes the latents of captioned images in random order, pre-training and
supervised finetuning alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.data import Batch
from glm_training.engine import setup
from glm_training.engine.families import DTYPES
from glm_training.engine.figures import mean_over_processes, stack_means
from glm_training.engine.preparation import Prepared
from glm_training.engine.validation import RowFigures, Subject, passes
from glm_training.methods.losses import MethodLoss
from glm_training.methods.token_flow import PredictTokens, TokenFlow
from glm_training.models.vgt.alignment import AlignmentTeacher
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.loading import Hub, local_folder
from glm_training.models.vgt.sequence import random_orders, raster_order
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World
from glm_training.utils.randomness import normal, uniform


@dataclass(frozen=True)
class Encoded:
    """B captioned images as the generator learns them: latents [B, C, h, w], features of REPA's encoder [B, L, R]."""

    prompts: list[str]
    latents: Tensor
    features: Tensor | None


class VGTGeneratorTrainer(BaseTrainer):
    """Flow matching of each latent under those written before it; the autoencoder is frozen."""

    family: VGT

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        self.generator = self.parts["generator"]
        assert self.family.generator is not None  # it is what is trained
        self.model = self.family.generator
        repa = config.vgt.repa
        self.flow = TokenFlow(config.vgt.timestep_shift, repa.weight)
        self.aligned: AlignmentTeacher | None = None
        if repa.model is not None:
            folder = local_folder(repa.model, Hub(None, config.model.local_files_only), "vgt.repa.model")
            self.aligned = AlignmentTeacher.from_pretrained(folder, DTYPES[config.model.torch_dtype]).to(world.device)

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self) -> dict[str, float]:
        chunks, part = self.config.training.gradient_accumulation_steps, self.generator
        terms: list[tuple[int, dict[str, Tensor]]] = []
        self.family.train()
        with self.phase("VGT step"):
            for chunk in range(chunks):
                batch, positions = self.next_batch()
                with self.autocast():
                    encoded = self._encode(batch)
                self.check_stop()
                with part.accumulating(last=chunk == chunks - 1):
                    with self.autocast():
                        dropped = self._dropped(encoded, positions)
                        term = self._loss(part.policy, dropped, self.config.seed, [(place,) for place in positions])
                    self.check_stop()  # the last backward pass waits for all: each must have come this far
                    part.backward(term.loss / chunks)
                terms.append((term.rows, {**term.metrics, "loss": term.loss.detach()}))
            figures = mean_over_processes(self.world, stack_means(terms)) | self.update(part)
        return {f"generator/{key}": value for key, value in figures.items()}

    @torch.no_grad()
    def _encode(self, batch: Batch) -> Encoded:
        assert batch.targets is not None  # captioned images always have them
        images = batch.targets.to(self.world.device)
        latents = self.family.autoencoder.eval().encode(images)
        grid = (latents.shape[2], latents.shape[3])
        features = None if self.aligned is None else self.aligned.features(images, grid)
        return Encoded(list(batch.prompts), latents, features)

    def _dropped(self, encoded: Encoded, positions: list[int]) -> Encoded:
        """With some captions left out, as guidance leaves them out in sampling."""
        draws = uniform(self.config.seed, "vgt/caption", [(position,) for position in positions], (1,))[:, 0]
        kept = (draws >= self.config.vgt.caption_dropout).tolist()
        prompts = [prompt if keep else "" for prompt, keep in zip(encoded.prompts, kept, strict=True)]
        return Encoded(prompts, encoded.latents, encoded.features)

    def _loss(self, policy: PredictTokens, batch: Encoded, seed: int, names: Sequence[tuple[int, ...]]) -> MethodLoss:
        """Under an order of writing, noise and noise levels of each image's own, named by `names`."""
        latents, device = batch.latents, batch.latents.device
        places = latents.shape[2] * latents.shape[3]
        raster = self.model.config.order == "raster"
        return self.flow.loss(
            policy,
            self.model.encode_prompts(batch.prompts),
            latents,
            raster_order(places) if raster else random_orders(seed, "vgt/order", names, places),
            draws=normal(seed, "vgt/levels", names, (places,), device),
            noise=normal(seed, "vgt/noise", names, tuple(latents.shape[1:]), device),
            teacher=batch.features,
        )

    # -- what it is judged by ------------------------------------------------------------------------------------------

    def judged(self) -> Subject | None:
        if not self.held_out.has_targets:
            return None
        return setup.judged_subject(self.config, self.held_out, "picture")

    @torch.no_grad()
    def judge(self) -> dict[str, Tensor]:
        """The loss on every held-out image, at the same order, noise and levels each time."""
        found = RowFigures(len(self.held_out))
        self.family.eval()
        for rows, counts in passes(len(self.held_out), self.config.training.batch_size, self.world):
            self.signals.check()
            encoded = self._encode(self.held_out.batch(rows))
            names = [(row,) for row in rows]
            term = self._loss(self.generator.component, encoded, self.config.evaluation.seed, names)
            found.add(rows, {"generator/loss": term.each["loss"]}, counts=counts)
        return found.gathered(self.world)
