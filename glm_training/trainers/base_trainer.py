"""The only loop: step, log, sample, evaluate, save, stop on a signal. Subclasses say what a step is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from glm_training.checkpoint.commit import checkpoint_name, save_checkpoint
from glm_training.checkpoint.resume import load_checkpoint
from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config
from glm_training.data import ImageDataset, TrainingData
from glm_training.engine import setup
from glm_training.engine.agreement import agree_on_weights, together
from glm_training.engine.clock import peak_memory
from glm_training.engine.errors import ScoringError
from glm_training.engine.evaluations import Evaluations
from glm_training.engine.families import build_family
from glm_training.engine.figures import Interval, Mean
from glm_training.engine.parts import Part
from glm_training.engine.phases import Phase, guarded
from glm_training.engine.preparation import Prepared
from glm_training.engine.resuming import save_context
from glm_training.engine.run_directory import open_run_directory
from glm_training.engine.summary import opening_lines
from glm_training.models.family import Family
from glm_training.models.lora import has_lora
from glm_training.reinforcement.monitors.monitors import Monitors
from glm_training.rewards import RewardError, ScoringStopped
from glm_training.utils.console import Console, Progress
from glm_training.utils.distributed import World, barrier
from glm_training.utils.signals import StopRequested, StopSignals


@dataclass
class TrainResult:
    """What a finished run hands back. `before` and `after` are held-out means by metric, empty without evaluation.

    `stopped_by`: the signal that stopped it; `halted`: why a monitor did. None where the run went to its end.
    """

    step: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    stopped_by: int | None = None
    halted: str | None = None


class BaseTrainer(ABC):
    """Builds everything a run needs, then `train()`.

    Registered state: the trained weights and optimizers of each part, the sampler's place, the first evaluation, what
    the monitors compare with, and what a subclass adds.
    """

    family: Family

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        self.config = config
        self.world = world
        self.console = Console(enabled=world.is_main)
        self.dataset, self.held_out, self.digests = prepared.dataset, prepared.held_out, prepared.digests
        self.notes, self.resume = prepared.notes, prepared.resume
        self.sampler, self.total_steps = prepared.sampler, prepared.total_steps
        self.calculator = prepared.calculator
        self.console.line(f"loading {config.model.name}")
        self.family = together(world, "loading the model", lambda: build_family(config, world))
        agree_on_weights(self.family, world)
        self.parts: dict[str, Part] = self.build_parts()
        self.evaluations = Evaluations(
            config,
            world,
            self.console,
            self.family,
            self.held_out,
            self.calculator,
            self.total_steps,
            prepared.watched,
        )
        self.monitors = Monitors(config, world)
        self.signals = StopSignals(world)
        self.interval = Interval()
        self.step = 0
        self.saved: Path | None = None
        self._changed = False

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def training_step(self) -> dict[str, float]:
        """One step: draws its batches, updates every part, and returns figures for the log."""

    @staticmethod
    def build_data(config: Config) -> tuple[TrainingData, ImageDataset]:
        """The training data, and the held-out prompts of samples and scores. DataError lists every problem."""
        dataset = setup.build_dataset(config)
        return dataset, setup.build_evaluation_dataset(config, dataset)

    @staticmethod  # noqa: B027  (most have nothing to add)
    def check_settings(config: Config, world: World) -> None:
        """Raises SettingsError for what a trainer cannot do under this configuration, whatever the data and weights."""

    def build_parts(self) -> dict[str, Part]:
        """What is trained, by the name it has in checkpoints and in the log."""
        return setup.build_parts(self.config, self.family, self.world, self.total_steps)

    def prepare(self) -> None:  # noqa: B027  (most have nothing to do here)
        """Work before the first step, after an earlier run's state was loaded."""

    def validates(self) -> bool:
        """Whether `validate` has figures to give."""
        return False

    def validate(self) -> dict[str, float]:
        """Figures on held-out data besides the scores of pictures, at each evaluation; logged as `eval/<name>`."""
        return {}

    def images_per_step(self) -> int:
        """Images that a step trains on, over all processes."""
        training = self.config.training
        return training.batch_size * training.gradient_accumulation_steps * self.world.world_size

    def remarks(self) -> list[str]:
        """Lines to tell after a step, besides its figures."""
        return []

    def extra_state(self) -> dict[str, StateTree]:
        """Named states for a checkpoint besides those of every run."""
        return {}

    def load_extra_state(self, state: dict[str, StateTree]) -> None:  # noqa: B027
        """Takes what `extra_state` gave, out of all states of the checkpoint."""

    def exports(self) -> dict[str, Callable[[Path], None]]:
        """Folders of a checkpoint besides the pipeline and the adapters: name -> what fills it."""
        return {}

    def after_save(self, checkpoint: Path) -> None:  # noqa: B027
        """After `checkpoint` was committed, on the main process."""

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Runs to `total_steps`, the first stop signal or a monitor that stops it; always leaves a checkpoint of where
        it stopped.

        A stop is acted on at once where the work in flight can be dropped without a trace: in an evaluation, and in a
        training step up to its first optimizer step. A resume then draws that step, or that evaluation, again. A step
        that has changed weights is finished first. Rewards that fail stop the run in the same way, with ScoringError.
        """
        resumed = self._open()
        with self.logger:
            return self._run(resumed)

    def _run(self, resumed: bool) -> TrainResult:
        stopped = False
        with (
            self.signals,
            self.console.progress(self.total_steps, self.step, every=self.config.logging.log_interval) as progress,
        ):
            try:
                self.prepare()
                if not resumed or self.evaluations.lacking(self.step, validates=self.validates()):
                    self._evaluate()
                while self.step < self.total_steps:
                    self._advance(progress)
            except StopRequested:
                stopped = True
                if self.saved != self._checkpoint() or self.monitors.halt is not None:
                    self.save()  # a monitor may have tripped after the step was saved
        if self.signals.failure is not None:
            raise ScoringError(
                f"{self.signals.failure}\nThe run stopped after step {self.step} of {self.total_steps} and nothing is "
                f"lost: once the cause is mended, --resume continues from {self.saved}"
            )
        return self._finish(stopped)

    def _advance(self, progress: Progress) -> None:
        """One training step with what is due after it. Raises StopRequested, without a trace of a step dropped."""
        started = time.perf_counter()
        place = self.sampler.state_dict()
        self._changed = False
        try:
            with self._stopping_when_rewards_fail():
                metrics = self.training_step()
        except StopRequested:
            self.sampler.load_state_dict(place)
            raise
        self.step += 1
        seconds = time.perf_counter() - started
        rate = {"images_per_second": Mean(self.images_per_step() / seconds, seconds)}
        self.interval.add({**rate, **metrics, "time/step_seconds": seconds})
        figures = self.interval.figures()
        last, stop = self.step == self.total_steps, self.signals.poll() or self._heed_monitors()
        if last or stop or self.step % self.config.logging.log_interval == 0:
            figures |= peak_memory(self.world)
            self.logger.log(self.step, figures)
        if self.step % self.config.logging.log_interval == 0:
            self.interval.clear()
        for remark in self.remarks():
            self._say(remark)
        progress.update(self.step, figures)
        if last or stop or self.step % self.config.logging.save_interval == 0:
            self.save()
        if stop:
            raise StopRequested
        self._evaluate()
        if self._heed_monitors():
            raise StopRequested

    def _heed_monitors(self) -> bool:
        """Tells what the monitors have to say; whether they stop the run."""
        for message in self.monitors.take_messages():
            self._say(f"warning: {message}")
        return self.monitors.halt is not None

    def _say(self, line: str) -> None:
        self.console.line(line)
        self.logger.text(line)

    def check_stop(self) -> None:
        """Raises StopRequested when a stop was asked for and the training step in flight can still be dropped.

        Every process must call it equally often between two optimizer steps.
        """
        if not self._changed:
            self.signals.check()

    def update(self, part: Part) -> dict[str, float]:
        """The optimizer step of a half. From here on the training step is finished, whatever is asked."""
        self._changed = True
        return part.step(self.step)

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Around a phase of the run: a full device or non-finite values in it are named so."""
        return guarded(name, self.config, self.world, self.step, self.saved)

    @contextmanager
    def _stopping_when_rewards_fail(self) -> Iterator[None]:
        """A failed reward inside becomes a request to stop, on all processes, while the work in flight can be dropped;
        so does a scoring that a stop signal has ended.

        The other processes learn of it where they poll next, so scores must be asked for right before a poll.
        """
        try:
            yield
        except ScoringStopped as stop:
            self.signals.poll()
            raise StopRequested from stop
        except RewardError as error:
            if self._changed:
                raise
            self.signals.fail(str(error))
            raise StopRequested from error

    def _evaluate(self) -> None:
        self._changed = False
        with self._stopping_when_rewards_fail(), self.phase("evaluation"), self.autocast():
            figures = self.validate() if self.validates() and self.evaluations.due(self.step) else {}
            if figures:
                self.logger.log(self.step, {f"eval/{name}": value for name, value in figures.items()})
            scores = self.evaluations.run(self.step, self.logger, self.signals.check, self.signals.requested)
        before = self.evaluations.before
        if scores is not None and before is not None:
            sources = self.held_out.batch(range(len(scores.images))).sources
            figures = self.monitors.after_evaluation(self.step, before, scores, sources)
            if figures:
                self.logger.log(self.step, figures)

    def _open(self) -> bool:
        """The run directory, the logger and, when asked, the state of an earlier run; whether there is one."""
        config, point = self.config, self.resume
        if point is not None:
            for skipped in point.skipped:
                self.console.line(f"passed over {skipped.path.name}: {skipped.reason}")
            self.load(load_checkpoint(point.path, verify=False))
            self.saved = point.path
            self.console.line(f"resumed from {point.path}, step {self.step} of {self.total_steps}")
        for line in opening_lines(config, self.world, len(self.dataset), self.total_steps):
            self.console.line(line)
        for note in self.notes:
            self.console.line(f"note: {note}")
        self.logger = open_run_directory(config, self.world, point, self.total_steps)
        for note in self.notes:
            self.logger.text(note)
        return point is not None

    def next_batch(self) -> tuple[Any, list[int]]:
        """The next batch of this process, of the kind its data has, and its items' places in the run's sequence of
        samples."""
        first = self.sampler.position + self.world.rank * self.sampler.batch_size
        epochs = self.sampler.peek_epochs()
        indices = self.sampler.next()
        batch = self.dataset.batch(indices, epoch=epochs)
        self.dataset.prefetch(self.sampler.peek())
        return batch, list(range(first, first + len(indices)))

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward pass, in rollout and replay alike."""
        return setup.autocast(self.config, self.world)

    def _finish(self, stopped: bool) -> TrainResult:
        self.dataset.close()
        result = TrainResult(self.step)
        if stopped:
            result.stopped_by, result.halted = self.signals.received, self.monitors.halt
            self.console.line(f"stopped after step {self.step} of {self.total_steps} and saved; --resume continues")
        else:
            result.before, result.after = self.evaluations.compared(self.step)
        self.console.line(f"figures, samples and checkpoints: {self.config.output_dir}")
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, StateTree]:
        """Every named state of the run, as far as `checkpoint.save_optimizer` wants it."""
        trainer: dict[str, Any] = {"step": self.step, "before": self.evaluations.state()}
        trainer["interval"] = self.interval.state()
        state: dict[str, StateTree] = {"trainer": trainer, "sampler": cast(StateTree, self.sampler.state_dict())}
        state["monitors"] = self.monitors.state()
        for part in self.parts.values():
            state |= part.state(with_optimizer=self.config.checkpoint.save_optimizer)
        return state | self.extra_state()

    def load(self, state: dict[str, StateTree]) -> None:
        """Continues from `state`, bit for bit on the CPU."""
        trainer = cast(dict[str, Any], state["trainer"])
        self.step = trainer["step"]
        self.evaluations.load(trainer["before"])
        self.interval.load(trainer["interval"])
        self.sampler.load_state_dict(cast(dict[str, int], state["sampler"]))
        self.monitors.load(cast(dict[str, Any], state.get("monitors", {})))
        for part in self.parts.values():
            part.load_state(state)
        self.load_extra_state(state)

    def save(self) -> None:
        """Commits a checkpoint of this step, from the main process."""
        with self.phase("saving"):
            self._save()
        self.saved = self._checkpoint()

    def _checkpoint(self) -> Path:
        return self.config.checkpoint_dir() / checkpoint_name(self.step)

    def _save(self) -> None:
        config = self.config.checkpoint
        adapted = [name for name in self.config.parts() if has_lora(self.family.module(name))]
        if self.world.is_main:
            extra = self.exports()
            extra_bytes = 0
            if not (adapted and config.save_lora_only):
                extra_bytes = self.family.pipeline_bytes()
                extra["pipeline"] = lambda folder: self.family.save_pretrained(folder, merge_lora=bool(adapted))
            for name in adapted:
                extra[f"lora_{name}"] = partial(self.family.save_lora, name)
            path = save_checkpoint(
                self.config.checkpoint_dir(),
                self.step,
                self.state(),
                total_limit=config.save_total_limit,
                metadata=save_context(self.config, self.digests),
                extra_dirs=extra,
                extra_bytes=extra_bytes,
            )
            if adapted and config.save_lora:
                for name in adapted:
                    self.family.save_lora(name, self.config.lora_dir() / f"step-{self.step:06d}" / name)
            self.after_save(path)
            self.logger.text(f"saved {path}")
        barrier(self.world)
