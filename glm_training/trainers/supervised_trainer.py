"""Supervised finetuning on target images, of one half or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_training.algorithms.flow_matching import sample_timestep_density
from glm_training.config import Config
from glm_training.data import Batch, ImageDataset, TrainingData
from glm_training.data.dataset import sizes_of
from glm_training.engine import setup
from glm_training.engine.captioned_setup import build_captioned_training
from glm_training.engine.figures import mean_divisor, mean_over_processes, stack_means
from glm_training.engine.parts import Part
from glm_training.engine.preparation import Prepared
from glm_training.engine.validation import LEVELS, RowFigures, Subject, passes
from glm_training.methods.losses import MethodLoss
from glm_training.methods.preference import DiffusionFinetuning
from glm_training.methods.supervised import FlowMatching, TokenCrossEntropy
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.family import GLMImage
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World
from glm_training.utils.randomness import derive_seed, normal, uniform


@dataclass
class Encoded:
    """A batch of B prompts as both halves need it: the AR half's prompt and target tokens [B, T], the images [B, 3, H,
    W] on the device, and the places of the prompts in the run's sequence of samples, which name the random draws."""

    prompts: list[str]
    positions: list[int]
    prompt: ARPrompt
    tokens: Tensor
    targets: Tensor
    sources: Tensor | None


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
        chunks = self.config.training.gradient_accumulation_steps
        rows, seen = trainer.sampler.rows_ahead(chunks), 0
        collected: dict[str, list[tuple[int, dict[str, Tensor]]]] = {name: [] for name in trainer.parts}
        figures: dict[str, float] = {}
        self.family.train()
        with trainer.phase("supervised step"):
            for chunk in range(chunks):
                with trainer.autocast():
                    drawn, positions = trainer.next_batch()
                    batch = self._encode(drawn, positions)
                trainer.check_stop()
                divisor = mean_divisor(rows, len(positions), trainer.world)
                seen += len(positions)
                for name, part in trainer.parts.items():
                    with part.accumulating(last=chunk == chunks - 1):
                        with trainer.autocast(), self._dropout_masks(trainer, name, chunk):
                            term = self._loss(part, batch)
                        trainer.check_stop()  # the last backward pass waits for all: each must have come this far
                        part.backward(term.loss / divisor)
                    collected[name].append((term.rows, term.metrics | {"loss": term.loss.detach()}))
            for name, part in trainer.parts.items():
                metrics = mean_over_processes(trainer.world, stack_means(collected[name]), seen) | trainer.update(part)
                figures |= {f"{name}/{key}": value for key, value in metrics.items()}
        return figures

    def judge(self, parts: Mapping[str, Part], batch: Batch, seed: int) -> Iterator[dict[str, Tensor]]:
        """Losses [B] by name of a batch whose places in the data name its noise, some several times: at one level of
        each quarter of the schedule."""
        encoded = self._encode(batch, batch.indices)
        if "ar" in parts:
            yield {"ar/loss": self.tokens.loss(parts["ar"].component, encoded.prompt, encoded.tokens).each["loss"]}
        if "dit" not in parts:
            return
        clean, condition = self._to_denoise(encoded)
        denoiser = self.family.denoiser(*encoded.targets.shape[-2:])
        for level in range(LEVELS):
            names = [(index, level) for index in batch.indices]
            u = (level + uniform(seed, "supervised/held-out level", names, (1,))[:, 0]) / LEVELS
            noise = normal(seed, "supervised/held-out noise", names, tuple(clean.shape[1:]), device=clean.device)
            levels = denoiser.levels(u).to(clean.device)
            term = DiffusionFinetuning(denoiser).loss(
                parts["dit"].component, clean, condition, noise=noise, levels=levels
            )
            yield {"dit/loss": term.each["loss"]}

    @contextmanager
    def _dropout_masks(self, trainer: BaseTrainer, part: str, chunk: int) -> Iterator[None]:
        """Inside, LoRA dropout draws masks that depend on the run's seed, step, process and chunk alone."""
        if self.config.lora_for("ar" if part == "ar" else "dit").dropout == 0:
            yield
            return
        device = trainer.world.device
        # nn.Dropout draws from the global generator: it is lent a named seed, and gets its own state back
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            place = (trainer.step, trainer.world.rank, chunk)
            torch.manual_seed(derive_seed(self.config.seed, f"supervised/dropout/{part}", *place))
            yield

    @torch.no_grad()
    def _encode(self, batch: Batch, positions: list[int]) -> Encoded:
        device = self.family.dit.device
        assert batch.targets is not None  # the data was scanned with require_targets
        targets = batch.targets.to(device)
        sources = None if batch.sources is None else batch.sources.to(device)
        height, width = targets.shape[-2:]
        prompt = self.family.ar.encode_prompts(batch.prompts, height, width, sources)
        tokens = self.family.ar.targets(targets, prompt)
        return Encoded(list(batch.prompts), positions, prompt, tokens, targets, sources)

    def _loss(self, part: Part, batch: Encoded) -> MethodLoss:
        if part.name == "ar":
            return self.tokens.loss(part.policy, batch.prompt, batch.tokens)
        seed, names = self.config.seed, [(position,) for position in batch.positions]
        device = self.family.dit.device
        clean, condition = self._to_denoise(batch)
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

    @torch.no_grad()
    def _to_denoise(self, batch: Encoded) -> tuple[Tensor, DiTCondition]:
        """Latents [B, C, h, w] of the targets, under their own tokens."""
        prompt = batch.prompt
        condition = self.family.dit.condition(
            batch.prompts,
            batch.tokens[:, prompt.preview_length :],
            prompt.large_grid,
            batch.sources,
            prompt.source_tokens,
            prompt.source_grid,
        )
        return self.family.dit.encode_images(batch.targets), condition


class SupervisedTrainer(BaseTrainer):
    """Trains whatever `model.component` names on the target images, and judges it by its loss on those of the
    evaluation, every one at the same noise."""

    family: GLMImage

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        self.supervision = Supervision(config, self.family)

    @staticmethod
    def build_data(config: Config) -> tuple[TrainingData, ImageDataset]:
        if config.data.images is None:
            return BaseTrainer.build_data(config)
        return build_captioned_training(config)

    def training_step(self) -> dict[str, float]:
        return self.supervision.step(self)

    def judged(self) -> Subject | None:
        if not self.held_out.has_targets:
            return None
        return setup.judged_subject(self.config, self.held_out, "target")

    @torch.no_grad()
    def judge(self) -> dict[str, Tensor]:
        """The loss of each part on every target; raises StopRequested, on all processes together."""
        found = RowFigures(len(self.held_out))
        self.family.eval()
        count, pixels = len(self.held_out), sizes_of(self.held_out)
        for rows, counts in passes(count, self.config.training.batch_size, self.world, pixels=pixels):
            self.signals.check()
            figures = self.supervision.judge(self.parts, self.held_out.batch(rows), self.config.evaluation.seed)
            for each in figures:
                found.add(rows, each, counts=counts)
        return found.gathered(self.world)


class ARTrainer(SupervisedTrainer):
    """Cross-entropy on the tokens of the target image; preview and large grid are logged apart."""

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        if config.parts() != ("ar",):
            raise ValueError(f"ARTrainer trains model.component ar, not {config.model.component}")
        super().__init__(config, world, prepared)


class DiTTrainer(SupervisedTrainer):
    """Flow matching under the real image's prior tokens, with condition dropout for guidance."""

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        if config.parts() != ("dit",):
            raise ValueError(f"DiTTrainer trains model.component dit, not {config.model.component}")
        super().__init__(config, world, prepared)
