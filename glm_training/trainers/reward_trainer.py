"""Reward training: draw plans and renders, score the pictures, and move each trained half towards the better ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config
from glm_training.data import Batch
from glm_training.data.samplers.sampler import Place
from glm_training.engine.clock import Clock
from glm_training.engine.encoding.batches import encoded_sources
from glm_training.engine.errors import SettingsError
from glm_training.engine.figures import Mean
from glm_training.engine.preparation import Prepared
from glm_training.engine.residency import Residency, optimizer_of, units_of
from glm_training.engine.sharding import update_problems
from glm_training.engine.stopping import Drawn
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.models.glm_image.family import GLMImage
from glm_training.reinforcement import updates
from glm_training.reinforcement.credit import Scored, assign_advantages
from glm_training.reinforcement.gate.gate import OnPolicyGate
from glm_training.reinforcement.kept import RolloutKeeper
from glm_training.reinforcement.plan_share import ShareReader
from glm_training.reinforcement.remarks import FlatSteps, MissingScores
from glm_training.reinforcement.resampling import Resampling, replace_flat_groups
from glm_training.reinforcement.rollout import Rollout, draw_rollout, noisy_steps, rollout_settings
from glm_training.reinforcement.scoring import ScoringQueue
from glm_training.reinforcement.token_credit import measure_entropies, weigh_tokens
from glm_training.reinforcement.updates import Learning
from glm_training.rewards import RewardBatch, score_batch
from glm_training.trainers.encoding_trainer import EncodingTrainer
from glm_training.trainers.supervised_trainer import Supervision
from glm_training.utils.distributed import World


class RewardTrainer(EncodingTrainer):
    """GRPO for `model.component` ar, dit or both, in t2i and i2i.

    A step draws N plans x M renders for batch_size x accumulation x processes prompts, and takes `updates_per_rollout`
    optimizer steps per half, each on its own share of the rows: row r belongs to update r mod their number.
    """

    family: GLMImage

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        self.settings = rollout_settings(config)
        self.supervision = (
            Supervision(config, self.family, self.encoding) if config.training.reward_frequency > 1 else None
        )
        self.ar_method = updates.ar_method(config) if "ar" in self.parts else None
        self.dit_method = updates.dit_method(config) if "dit" in self.parts else None
        units = units_of(self.family.residents(), self.parts)
        self.residency = Residency(units, world.device, enabled=config.training.offload_between_phases)
        self.gate = OnPolicyGate(config, world, self.family, self.parts, self.residency.only)
        self.shares, self.missing, self.flat = ShareReader(), MissingScores(world), FlatSteps()
        self.keeper = RolloutKeeper(config, world, self.total_steps)

    @staticmethod
    def check_settings(config: Config, world: World) -> None:
        problems = update_problems(config, world.world_size)
        if problems:
            raise SettingsError("\n".join(problems))

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self) -> dict[str, float]:
        if self.supervision is not None and (self.step + 1) % self.config.training.reward_frequency != 0:
            self.residency.all()
            return {_apart(name): value for name, value in self.supervision.step(self).items()}
        passed = self.gate.state()
        try:
            return self._reward_step()
        except Exception:
            self.gate.load(passed)  # a step that is dropped has checked nothing: the log of a resume has it again
            raise

    def _reward_step(self) -> dict[str, float]:
        clock = Clock(self.world)
        prompts = self.sampler.rows_ahead(self.config.training.gradient_accumulation_steps)
        chunks = self._draw_and_score(clock)
        chunks, metrics = replace_flat_groups(self.resampling(), chunks)
        learning, grpo = self.learning(), self.config.reward.grpo
        if self.ar_method is not None and grpo.ar.entropy_reward > 0:
            with self.phase("AR update"):
                self.residency.only("ar")
                metrics |= measure_entropies(learning, self.ar_method, chunks)
        with self.phase("reward"):
            metrics |= assign_advantages(chunks, self.config, self.world, self.step)
            self.missing.look(self.step + 1, chunks, metrics)
        self.keeper.keep(self.step + 1, chunks)
        metrics |= self.monitors.look([(chunk.rollout.images, self.settings.group) for chunk in chunks])
        images = prompts * self.settings.group
        for chunk in chunks:
            chunk.rollout.images = chunk.rollout.images[:0].clone()  # large, of no more use; a slice would hold them
        self.family.train()
        if self.gate.due(self.step):
            with self.phase("AR update" if "ar" in self.parts else "DiT update"), self.autocast():
                metrics |= self.gate.check(self.step, chunks[0].rollout, self.ar_method, self.dit_method)
        if self.ar_method is not None:
            with self.phase("AR update"):
                if self.ar_method.similarity_weighting:
                    weigh_tokens(chunks, self.family.ar.code_vectors)
                self.residency.only("ar", optimizer_of("ar"))
                metrics |= updates.update_ar(learning, self.ar_method, chunks)
        clock.lap("ar_update")
        if self.dit_method is not None:
            with self.phase("DiT update"):
                self.residency.only("dit", optimizer_of("dit"))
                metrics |= updates.update_dit(learning, self.dit_method, chunks)
        clock.lap("dit_update")
        metrics["images_per_second"] = Mean(images / clock.total(), clock.total())
        metrics |= clock.laps | self._token_rate(chunks)
        self.monitors.after_step(self.step + 1, metrics)
        self.shares.add(metrics)
        self.flat.look(prompts, metrics)
        self.evaluations.training.add(list(chunks[0].result.components), metrics)
        return metrics

    def after_step(self) -> list[str]:
        """Why samples have no score, that nothing is learned, and now and then, in a line, what the credit tree says
        about where the reward comes from."""
        self.keeper.write()
        last = self.step == self.total_steps
        lines = [*self.missing.read(), *self.flat.read(last=last)]
        if not last and self.step % self.config.logging.eval_interval != 0:
            return lines
        reading = self.shares.read()
        return lines if reading is None else [*lines, reading]

    def _token_rate(self, chunks: list[Scored]) -> dict[str, float]:
        """Tokens that all processes' AR halves drew, per second of drawing them."""
        tokens = self.world.world_size * sum(chunk.rollout.plans.tokens.numel() for chunk in chunks)
        seconds = sum(chunk.rollout.plan_seconds for chunk in chunks)
        return {"tokens_per_second": Mean(tokens / seconds, seconds)} if seconds > 0 else {}

    def extra_state(self) -> dict[str, StateTree]:
        return {"reward": {"gate": self.gate.state(), "plan_shares": self.shares.state(), "flat": self.flat.state()}}

    def load_extra_state(self, state: dict[str, StateTree]) -> None:
        own = state["reward"]
        self.gate.load(own["gate"])
        self.shares.load(own["plan_shares"])
        self.flat.load(own["flat"])

    def _draw_and_score(self, clock: Clock) -> list[Scored]:
        """The rollouts of the step with their rewards. A chunk is scored while the next is drawn."""
        count, start = self.config.training.gradient_accumulation_steps, self.sampler.position
        # processes that draw pictures of different sizes take different numbers of steps, and meet between them alone
        unequal = self.config.data.buckets.enabled and self.world.world_size > 1
        on_step = None if unequal else self.check_stop
        with ScoringQueue(
            self.world, self.signals.requested, overlap=self.config.reward.overlap and count > 1
        ) as queue:
            for _ in range(count):
                rollout = self.draw(*self.next_batch(), on_step=on_step)
                clock.lap("rollout")
                queue.put(partial(self.score, rollout))
                self.check_stop()
                clock.lap("reward")
            scored = queue.results()
        self.check_stop()
        clock.lap("reward")
        for item in scored:
            item.first_prompt = item.rollout.positions[0] - start
        return scored

    def draw(self, batch: Batch, positions: list[int], *, on_step: Callable[[], None] | None) -> Rollout:
        """The samples of a batch's prompts, whose places in the run's sequence of samples are `positions`."""
        self.family.eval()
        height, width = self.dataset.size_of(batch.indices[0])
        drawing = self.parts["dit"].as_old() if "dit" in self.parts else nullcontext()
        with self.phase("rollout"), self.autocast():
            # before the weights that draw stand in for the DiT's: both are away then, and come together
            self.residency.only("vae")
            sources = encoded_sources(self.encoding, batch)
        with self.phase("rollout"), drawing, self.autocast():
            return draw_rollout(
                self.family,
                batch,
                positions,
                replace(self.settings, height=height, width=width),
                sources=sources,
                seed=self.config.seed,
                sde_indices=self._sde_indices(),
                on_step=on_step,
                meet=self.meet,
                uses=self.residency.only,
            )

    def score(self, rollout: Rollout) -> Scored:
        """The rewards of a rollout; may run beside the drawing of the next one."""
        repeat = partial(torch.repeat_interleave, repeats=self.settings.group, dim=0)
        assert self.calculator is not None
        batch = RewardBatch(
            rollout.images,
            [prompt for prompt in rollout.prompts for _ in range(self.settings.group)],
            None if rollout.targets is None else repeat(rollout.targets),
            None if rollout.sources is None else repeat(rollout.sources),
            self.signals.requested,
        )
        with self.phase("reward"):
            return Scored(rollout, score_batch(self.calculator, batch))

    def _evaluate(self) -> None:
        if self.evaluations.scores_due(self.step) or self.evaluations.samples_due(self.step):
            with self.phase("evaluation"):
                self.residency.only(*self.family.residents())
        super()._evaluate()

    def _sde_indices(self) -> tuple[int, ...]:
        """The noisy steps of this training step; none where the DiT is not trained by its likelihood."""
        if not isinstance(self.dit_method, FlowPolicyGradient):
            return ()
        return noisy_steps(self.config, self.settings, self.step)

    def _draw_more(self, places: list[Place]) -> Rollout:
        """New samples of the prompts at `places`."""
        items, positions = [place.index for place in places], [place.position for place in places]
        self.in_flight.drawn.append(Drawn(items, positions))
        batch = self.dataset.batch(items, epoch=[place.epoch for place in places])
        return self.draw(batch, positions, on_step=None)

    def _draw_along(self, place: Place) -> None:
        self._draw_more([place])

    def resampling(self) -> Resampling:
        """What `replace_flat_groups` needs of this run."""
        return Resampling(
            self.config,
            self.world,
            self.sampler,
            tuple(self.parts),
            lambda places: self.score(self._draw_more(places)),
            self.check_stop,
            None if self.strategy.shards is None else self._draw_along,
        )

    def learning(self) -> Learning:
        """What the updates of the step in flight need of this run."""
        return Learning(
            self.config, self.world, self.parts, self.settings, self.step, self.autocast, self.check_stop, self.update
        )


def _apart(name: str) -> str:
    """The name of a supervised step's figure where a reward step has one of the same name and another meaning."""
    half, _, last = name.rpartition("/")
    return f"{half}/supervised_{last}" if last in ("loss", "grad_norm") else name
