"""Supervised finetuning on target images, of one half or both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.data.dataset import sizes_of
from glm_training.engine import setup
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.figures import mean_divisor, mean_over_processes, stack_means
from glm_training.engine.preparation import Prepared
from glm_training.engine.validation import RowFigures, Subject, passes
from glm_training.models.family import Family
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.encoding_trainer import EncodingTrainer
from glm_training.trainers.supervised_terms import TERMS
from glm_training.utils.distributed import World
from glm_training.utils.randomness import derive_seed


class Supervision:
    """The supervised step: each part learns its own term of the same images."""

    def __init__(self, config: Config, family: Family, encoding: Encoding) -> None:
        self.config = config
        self.family = family
        self.terms = TERMS[config.model.family](config, family, encoding)

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
                    batch = self.terms.encode(drawn, positions)
                trainer.check_stop()
                divisor = mean_divisor(rows, len(positions), trainer.world)
                seen += len(positions)
                for name, part in trainer.parts.items():
                    with part.accumulating(last=chunk == chunks - 1):
                        with trainer.autocast(), self._dropout_masks(trainer, name, chunk):
                            term = self.terms.loss(part, batch)
                        trainer.check_stop()  # the last backward pass waits for all: each must have come this far
                        part.backward(term.loss / divisor)
                    collected[name].append((term.rows, term.metrics | {"loss": term.loss.detach()}))
            for name, part in trainer.parts.items():
                metrics = mean_over_processes(trainer.world, stack_means(collected[name]), seen) | trainer.update(part)
                figures |= {f"{name}/{key}": value for key, value in metrics.items()}
        return figures

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


class SupervisedTrainer(EncodingTrainer):
    """Trains whatever `model.component` names on the target images, and judges it by its loss on those of the
    evaluation, every one at the same noise."""

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        self.supervision = Supervision(config, self.family, self.encoding)

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
            figures = self.supervision.terms.judge(self.parts, self.held_out.batch(rows), self.config.evaluation.seed)
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
