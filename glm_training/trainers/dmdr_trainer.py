"""DMDR: distillation to few steps by distribution matching, from a certain step on with rewards as well.

A training step updates the guidance network on what the generator makes of the step's prompts; every
`dmdr.update_ratio`-th also updates the generator. Two networks, two optimizers, no real images, no discriminator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from glm_training.config import Config
from glm_training.config.schema import first
from glm_training.config.sections.base import Part as PartName
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import DTYPES, Condition, build_conditions
from glm_training.engine.figures import mean_over_processes, stack_means
from glm_training.engine.parts import Part
from glm_training.engine.preparation import Prepared
from glm_training.methods.distillation import BackwardSimulation, Dynamics, Scores, fake_score_loss, generator_loss
from glm_training.methods.losses import MethodLoss
from glm_training.models.family import FewSteps, units_in
from glm_training.models.gathering import gathered
from glm_training.models.lora import adapters_scaled, add_lora, save_lora, trainable_parameters
from glm_training.models.sdxl.family import save_lora_for_diffusers
from glm_training.models.weights import frozen_copy, in_fp32, load_weights
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.dmdr_outputs import GUIDANCE_EXPORT, OutputTree
from glm_training.utils.distributed import World
from glm_training.utils.randomness import derive_seed, normal, uniform

GUIDANCE = "guidance"
"""Name of the guidance network among the trained parts."""

Terms = dict[str, list[tuple[int, dict[str, Tensor]]]]
"""Figures of the accumulation chunks, with the rows of each, by part."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of B samples.

    start [B, N, C, h, w] standard normal: of the generator's sampler; pick [B]: its step. guidance, generator: noise
    [B, C, h, w] and uniform [B] of the noise level at which either is trained.
    """

    start: Tensor
    pick: Tensor
    guidance: tuple[Tensor, Tensor]
    generator: tuple[Tensor, Tensor]


class DMDRTrainer(BaseTrainer):
    """Distils the diffusion half of either family."""

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        self.generator, self.guidance = self.parts[self.name], self.parts[GUIDANCE]
        denoiser = self.family.denoiser(config.data.image_size.height, config.data.image_size.width)
        self.simulation = BackwardSimulation(denoiser, config.dmdr.student_steps)
        self.scores = Scores(
            denoiser, self.guidance.component, self.teacher, config.dmdr.fake_scale, config.dmdr.real_guidance_scale
        )
        self.dynamics = dynamics(config, self.total_steps)
        self.conditions = build_conditions(config, self.family)
        self.scorers = prepared.scorers
        if self.scorers is not None:
            self.evaluations.add_scorer("dmdr.reward", self.scorers.scores)
        self.outputs = OutputTree(config, self.name)

    # -- what there is to train ----------------------------------------------------------------------------------------

    @property
    def name(self) -> PartName:
        """The generator's name among the trained parts, and its component's in the family."""
        return self.config.parts()[0]

    def build_parts(self) -> dict[str, Part]:
        """The generator, and the guidance network: the teacher, as the generator was loaded, with an adapter."""
        config, dmdr = self.config, self.config.dmdr
        self.family.draw_in_few_steps(FewSteps(dmdr.student_steps, dmdr.one_step_timestep))
        generator = self.family.module(self.name)
        # ahead of initial_weights, which are the generator's alone: the teacher is the model as it was loaded
        self.teacher: nn.Module = frozen_copy(generator, DTYPES[config.model.torch_dtype])
        targets = config.lora_for(self.name).targets
        seed = derive_seed(config.seed, "dmdr/guidance adapter")
        add_lora(self.teacher, targets, dmdr.guidance_rank, dmdr.guidance_alpha, seed=seed)
        if dmdr.initial_weights is not None:
            in_fp32(self.family.trainable(self.name).values())  # half precision would round what is read
            try:
                load_weights(generator, dmdr.initial_weights)
            except (OSError, ValueError) as error:
                raise SettingsError(f"dmdr.initial_weights: {error}") from error
        guidance = cast(Any, self.family.component(self.name)).sharing(self.teacher)
        parts = super().build_parts()
        if self.strategy.shards is not None:
            self.strategy.shards.shard(guidance, units_in(guidance, self.teacher), self.family.frozen())
        settings = config.optimizer_for(self.name)
        parts[GUIDANCE] = Part(
            GUIDANCE,
            guidance.to(self.world.device),
            trainable_parameters(self.teacher),
            replace(settings, learning_rate=first(dmdr.guidance_learning_rate, settings.learning_rate)),
            self.world,
            total_steps=self.total_steps,
            find_unused_parameters=config.distributed.find_unused_parameters,
            loss_scaling=config.training.mixed_precision == "fp16",
        )
        return parts

    def prepare(self) -> None:
        if self.world.is_main:
            self.outputs.open(self.step)

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self) -> dict[str, float]:
        dmdr, chunks = self.config.dmdr, self.config.training.gradient_accumulation_steps
        due = (self.step + 1) % dmdr.update_ratio == 0
        terms: Terms = {GUIDANCE: [], self.name: []}
        with self.phase("distillation step"):
            for chunk in range(chunks):
                self._accumulate(terms, due, chunks, last=chunk == chunks - 1)
            figures = {"dmdr/real_scale": self.dynamics.real_scale(self.step)}
            figures |= self._update(self.guidance, terms)
            if due:
                figures |= self._update(self.generator, terms)
        return figures

    def _accumulate(self, terms: Terms, due: bool, chunks: int, last: bool) -> None:
        """Adds the gradients of one batch of prompts, of the generator too if it is `due`.

        Its samples serve both networks, and its pass comes first: then its activations are gone before the other's.
        """
        batch, positions = self.next_batch()
        prompts = list(batch.prompts)
        with torch.no_grad(), self.autocast():
            epochs = [position // len(self.dataset) for position in positions]
            condition = self.conditions.of(prompts, batch.indices, epochs)
            draws = self._draws(positions)
            picks = self.simulation.picks(draws.pick)
            self.check_stop()  # shards are gathered, and what follows waits for all: each must have come this far
            with gathered(self.generator.component):  # shards: each process takes as many passes as its rows need
                inputs = self.simulation.inputs(self.generator.component, draws.start, picks, condition)
                if not due:
                    generated = self.simulation.generate(self.generator.component, inputs, picks, condition)
        self.check_stop()  # here and below as well
        if due:  # backward passes lie outside autocast
            with self.generator.accumulating(last):
                with self.autocast():
                    generated = self.simulation.generate(self.generator.policy, inputs, picks, condition)
                    term = self._generator_loss(generated, prompts, condition, draws)
                self.check_stop()
                self.generator.backward(term.loss / chunks)
            terms[self.name].append((term.rows, term.metrics))
            generated = generated.detach()
        noise, level = draws.guidance
        scaled = adapters_scaled(self.teacher, self.config.dmdr.fake_scale)  # checkpointed blocks run again in backward
        with scaled, self.guidance.accumulating(last):
            with self.autocast():
                term = fake_score_loss(
                    self.simulation.denoiser,
                    self.guidance.policy,
                    generated,
                    condition,
                    noise=noise,
                    u=self.dynamics.levels(level, self.step),
                )
            self.check_stop()
            self.guidance.backward(term.loss / chunks)
        terms[GUIDANCE].append((term.rows, term.metrics))

    def _generator_loss(self, generated: Tensor, prompts: list[str], condition: Condition, draws: Draws) -> MethodLoss:
        """Distribution matching, and after the cold start the rewards of the decoded x0."""
        noise, level = draws.generator
        term = generator_loss(
            self.scores,
            generated,
            condition,
            noise=noise,
            u=self.dynamics.levels(level, self.step),
            real_scale=self.dynamics.real_scale(self.step),
        )
        if not self.rewards_count():
            return term
        loss, scores = self.reward_loss(generated, prompts)
        metrics = {**term.metrics, "reward_loss": loss.detach(), **{f"score_{k}": v for k, v in scores.items()}}
        return MethodLoss(term.loss + loss, term.rows, metrics)

    def rewards_count(self) -> bool:
        """Whether the training step in hand has rewards: the cold start has ended."""
        cold_start = self.config.dmdr.cold_start_steps
        return cold_start is not None and self.step >= cold_start

    def reward_loss(self, generated: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted hinge of the scores of x0 `generated` [B, C, h, w], through the decoder; and the mean scores."""
        assert self.scorers is not None  # they are built where a step of the run has rewards
        component: Any = self.generator.component
        options: dict[str, Any] = {"micro_batch_size": self.config.rollout.vae_batch_size or len(generated)}
        if self.config.dmdr.reward.decoder == "taesd":
            options["taesd"] = True
        return self.scorers.losses(component.decode_latents(generated, **options), prompts)

    def _draws(self, positions: list[int]) -> Draws:
        """Named by the samples' places in the run, so the same on any number of processes."""
        size, seed = self.config.data.image_size, self.config.seed
        device, steps = self.world.device, self.simulation.draws
        shape = cast(Any, self.generator.component).latent_shape(size.height, size.width)
        names = [(position,) for position in positions]
        # one draw per sample, cut up in this order: another order would give every run other numbers
        noise = normal(seed, "dmdr/noise", names, (steps + 2, *shape), device=device)
        draws = uniform(seed, "dmdr/levels", names, (3,))
        renoised, levels = noise[:, steps:], draws[:, 1:]
        return Draws(noise[:, :steps], draws[:, 0], (renoised[:, 0], levels[:, 0]), (renoised[:, 1], levels[:, 1]))

    def _update(self, part: Part, terms: Terms) -> dict[str, float]:
        """The optimizer step of a network, its line in the loss log, and its figures."""
        figures = mean_over_processes(self.world, stack_means(terms[part.name])) | self.update(part)
        if self.world.is_main:
            self.outputs.write_losses("gui" if part is self.guidance else "gen", self.step + 1, figures)
        return {f"{part.name}/{key}": value for key, value in figures.items()}

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def exports(self) -> dict[str, Callable[[Path], None]]:
        save = save_lora_for_diffusers if self.name == "unet" else save_lora
        return {GUIDANCE_EXPORT: partial(save, self.teacher)}

    def after_save(self, checkpoint: Path) -> None:
        self.outputs.link(checkpoint)


def dynamics(config: Config, total_steps: int) -> Dynamics:
    """DynaDG and DynaRS of the run: over `dmdr.dynamic_steps`, the cold start, or all of it."""
    dmdr = config.dmdr
    steps = first(dmdr.dynamic_steps, dmdr.cold_start_steps, total_steps) or None  # none in no cold start
    return Dynamics(
        dmdr.real_scale,
        steps if dmdr.dynamic_guidance else None,
        steps if dmdr.dynamic_renoise else None,
        *dmdr.renoise_range,
    )
