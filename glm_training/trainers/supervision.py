"""A supervised step on target images, for whichever halves are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glm_training.algorithms.flow_matching import sample_timestep_density
from glm_training.config import Config
from glm_training.data import Batch
from glm_training.methods.losses import MethodLoss
from glm_training.methods.supervised import FlowMatching, TokenCrossEntropy
from glm_training.models.glm_image.family import GLMImage
from glm_training.trainers.parts import Part
from glm_training.utils.randomness import normal, uniform

if TYPE_CHECKING:
    from glm_training.trainers.base_trainer import BaseTrainer


class Supervision:
    """Cross-entropy of the AR half on the target's tokens; flow matching of the DiT half under those tokens."""

    def __init__(self, config: Config, family: GLMImage) -> None:
        self.config = config
        self.family = family
        training = config.training
        self.tokens = TokenCrossEntropy(training.preview_loss_weight, training.large_loss_weight)
        self.flow = FlowMatching()

    def step(self, trainer: BaseTrainer) -> dict[str, float]:
        """One optimizer step of every part, over all accumulation chunks; the figures of the log."""
        from glm_training.trainers.base_trainer import mean_over_processes, stack_means

        chunks = self.config.training.gradient_accumulation_steps
        collected: dict[str, list[tuple[int, dict[str, Tensor]]]] = {name: [] for name in trainer.parts}
        self.family.train()
        for chunk in range(chunks):
            batch, positions = trainer.next_batch()
            for name, part in trainer.parts.items():
                with part.accumulating(last=chunk == chunks - 1):
                    with trainer.autocast():
                        term = self._loss(part, batch, positions)
                    part.backward(term.loss / chunks)
                collected[name].append((term.rows, term.metrics | {"loss": term.loss.detach()}))
        figures: dict[str, float] = {}
        for name, part in trainer.parts.items():
            metrics = mean_over_processes(trainer.world, stack_means(collected[name])) | part.step(trainer.step)
            figures |= {f"{name}/{key}": value for key, value in metrics.items()}
        return figures

    def _loss(self, part: Part, batch: Batch, positions: list[int]) -> MethodLoss:
        device = self.family.dit.device
        assert batch.targets is not None  # the data was scanned with require_targets
        targets = batch.targets.to(device)
        sources = None if batch.sources is None else batch.sources.to(device)
        height, width = targets.shape[-2:]
        with torch.no_grad():
            prompt = self.family.ar.encode_prompts(batch.prompts, height, width, sources)
            tokens = self.family.ar.targets(targets, prompt)
        if part.name == "ar":
            return self.tokens.loss(part.policy, prompt, tokens)
        seed, names = self.config.seed, [(position,) for position in positions]
        with torch.no_grad():
            clean = self.family.dit.encode_images(targets)
            condition = self.family.dit.condition(
                batch.prompts,
                tokens[:, prompt.preview_length :],
                prompt.large_grid,
                sources,
                prompt.source_tokens,
                prompt.source_grid,
            )
        draws = uniform(seed, "supervised/level", names, (2,), device=device)
        return self.flow.loss(
            part.policy,
            self.family.dit,
            clean,
            condition,
            noise=normal(seed, "supervised/noise", names, tuple(clean.shape[1:]), device=device),
            u=sample_timestep_density(draws[:, 0], self.config.training.timestep_density),
            drop=draws[:, 1] < self.config.training.prior_dropout,
        )
