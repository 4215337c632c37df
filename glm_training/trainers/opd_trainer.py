"""On-policy distillation of several experts into one GLM-Image (arXiv:2605.08063, 2605.15055): the student draws, and
the teacher of each prompt says at the same states what it would have drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from glm_training.config import Config
from glm_training.data import ImageDataset, TrainingData
from glm_training.engine.agreement import together
from glm_training.engine.clock import Clock
from glm_training.engine.encoding.batches import encoded_sources
from glm_training.engine.errors import SettingsError
from glm_training.engine.figures import Mean
from glm_training.engine.preparation import Prepared
from glm_training.engine.teachers import build_teachers, routes
from glm_training.methods.losses import MethodLoss
from glm_training.methods.on_policy_distillation import step_terms, token_terms
from glm_training.models.glm_image.family import GLMImage
from glm_training.reinforcement.rollout import Rollout, draw_rollout, noisy_steps, rollout_settings
from glm_training.reinforcement.updates import Learning, Slice, optimise
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.encoding_trainer import EncodingTrainer
from glm_training.utils.distributed import World, gather_objects


class OPDTrainer(EncodingTrainer):
    """A step draws plans and renders for batch_size x accumulation x processes prompts, as reward training does, and
    takes one optimizer step per trained half. Nothing is decoded or scored. Rows of one teacher go through a half
    together, so that each pass of the student has one pass of one teacher."""

    family: GLMImage

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        assert isinstance(self.dataset, ImageDataset)
        self.settings = rollout_settings(config)
        self.routes = routes(config, self.dataset)
        # before an earlier run's state is loaded: adapters of teachers belong on the weights that the run starts with
        self.teachers = together(world, "loading the teachers", lambda: build_teachers(config, self.family, world))

    @staticmethod
    def build_data(config: Config) -> tuple[TrainingData, ImageDataset]:
        dataset, held_out = BaseTrainer.build_data(config)
        if not isinstance(dataset, ImageDataset):
            raise SettingsError("opd takes its prompts from data.prompts_file or data.metadata_file, not data.images")
        routes(config, dataset)
        return dataset, held_out

    def training_step(self) -> dict[str, float]:
        clock = Clock(self.world)
        prompts = self.sampler.rows_ahead(self.config.training.gradient_accumulation_steps)
        chunks = []
        for _ in range(self.config.training.gradient_accumulation_steps):
            chunks.append(self.draw())
            self.check_stop()
        clock.lap("rollout")
        self.family.train()
        learning = Learning(
            self.config, self.world, self.parts, self.settings, self.step, self.autocast, self.check_stop, self.update
        )
        metrics: dict[str, float] = {}
        if "ar" in self.parts:
            with self.phase("AR update"):
                metrics |= self._update(learning, "ar", chunks)
        clock.lap("ar_update")
        if "dit" in self.parts:
            with self.phase("DiT update"):
                metrics |= self._update(learning, "dit", chunks)
        clock.lap("dit_update")
        metrics["images_per_second"] = Mean(prompts * self.settings.group / clock.total(), clock.total())
        return metrics | clock.laps

    def draw(self) -> Rollout:
        """The samples of the next batch's prompts, by the student."""
        self.family.eval()
        batch, positions = self.next_batch()
        height, width = self.dataset.size_of(batch.indices[0])
        # processes that draw pictures of different sizes take different numbers of steps, and meet between them alone
        unequal = self.config.data.buckets.enabled and self.world.world_size > 1
        with self.phase("rollout"), self.autocast():
            return draw_rollout(
                self.family,
                batch,
                positions,
                replace(self.settings, height=height, width=width),
                sources=encoded_sources(self.encoding, batch),
                seed=self.config.seed,
                sde_indices=noisy_steps(self.config, self.settings, self.step) if "dit" in self.parts else (),
                on_step=None if unequal else self.check_stop,
                meet=self.meet,
                decode=False,
            )

    def _update(self, run: Learning, name: str, chunks: list[Rollout]) -> dict[str, float]:
        """The optimizer step of a half."""
        part = self.parts[name]
        rows_per_prompt = self.settings.plans if name == "ar" else self.settings.group
        slices, owners = self._slices(run, name, chunks, rows_per_prompt)

        def terms(piece: Slice) -> Iterator[MethodLoss]:
            owner = owners[id(piece)]
            teacher, rollout, rows = self.teachers[owner][name], chunks[piece.chunk], piece.rows.to(self.world.device)
            if name == "ar":
                stream = token_terms(part.policy, part.component, teacher, rollout.plans.select(rows))
            else:
                stream = step_terms(part.policy, part.component, teacher, rollout.renders.select(rows))
            for term in stream:
                yield replace(term, metrics=term.metrics | {f"kl_{owner}": term.metrics["kl"]})

        count = 1 if name == "ar" else len(chunks[0].renders.sde_indices)
        return optimise(run, part, [], rows_per_prompt, slices, terms, count)

    def _slices(
        self, run: Learning, half: str, chunks: list[Rollout], rows_per_prompt: int
    ) -> tuple[list[Slice], dict[int, str]]:
        """What goes through a half together, teacher by teacher, and whose each slice is, by `id`. Every process has
        equally many of each teacher: one whose weights lie in shards answers all of them at once."""
        slices: list[Slice] = []
        owners: dict[int, str] = {}
        for teacher in self.teachers:
            own = []
            for index, chunk in enumerate(chunks):
                names = [self.routes[prompt] for prompt in chunk.prompts for _ in range(rows_per_prompt)]
                rows = torch.tensor([row for row, name in enumerate(names) if name == teacher], dtype=torch.long)
                own += [Slice(0, index, piece, len(piece)) for piece in run.micro(rows, half) if len(piece)]
            most = max(gather_objects(self.world, len(own)))
            own += [Slice(0, 0, torch.zeros(1, dtype=torch.long), 0) for _ in range(most - len(own))]
            owners |= {id(piece): teacher for piece in own}
            slices += own
        return slices, owners
