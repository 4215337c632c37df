"""The only loop: step, log, sample, evaluate, save, stop on a signal. Subclasses say what a step is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from glm_training.checkpoint.commit import checkpoint_name
from glm_training.checkpoint.resume import load_checkpoint
from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config
from glm_training.data import ImageDataset, TrainingData
from glm_training.engine import setup
from glm_training.engine.agreement import agree_on_weights, losses_explained, together
from glm_training.engine.best import BestCheckpoint
from glm_training.engine.captioned_setup import build_captioned_training
from glm_training.engine.clock import peak_memory
from glm_training.engine.errors import TrainingError
from glm_training.engine.evaluations import Evaluations
from glm_training.engine.families import build_family
from glm_training.engine.figures import Interval, Mean
from glm_training.engine.parts import Part, as_shown
from glm_training.engine.phases import Phase, guarded
from glm_training.engine.preparation import Prepared
from glm_training.engine.resuming import moved_schedules
from glm_training.engine.run_directory import RunDirectory, held_run_directory
from glm_training.engine.saving import commit
from glm_training.engine.sharding import choose
from glm_training.engine.stopping import Drawn, InFlight, as_failure, ended
from glm_training.engine.summary import TrainResult, opening_lines, resumed_line
from glm_training.engine.validation import Subject
from glm_training.models.family import Family
from glm_training.reinforcement.monitors.monitors import Monitors
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, broadcast_object
from glm_training.utils.failures import beside_training
from glm_training.utils.progress import Progress
from glm_training.utils.signals import StopRequested, StopSignals


class BaseTrainer(ABC):
    """Builds everything a run needs, then `train()`.

    Registered state: the trained weights and optimizers of each part, the sampler's place, the first evaluation, what
    the monitors compare with, and what a subclass adds.
    """

    family: Family

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        self.config, self.world = config, world
        self.console = Console(enabled=world.is_main)
        self.dataset, self.held_out, self.digests = prepared.dataset, prepared.held_out, prepared.digests
        self.notes, self.resume = prepared.notes, prepared.resume
        self.sampler, self.total_steps, self.calculator = prepared.sampler, prepared.total_steps, prepared.calculator
        self.console.line(f"loading {config.model.name}")
        self.family = together(world, "loading the model", lambda: build_family(config, world))
        agree_on_weights(self.family, world)
        self.strategy = choose(config, self.family, world)
        self.notes += self.strategy.told()
        self.parts: dict[str, Part] = self.build_parts()
        settings = config, world, self.console
        self.evaluations = Evaluations(
            *settings, self.family, self.held_out, self.calculator, self.total_steps, self.judged()
        )
        self.best = BestCheckpoint(config, world)
        if prepared.watched is not None:
            self.evaluations.add_scorer("reward.monitors.metrics", prepared.watched.scores)
        watched = None if prepared.watched is None else tuple(prepared.watched.calculators)
        self.monitors = Monitors(config, world, watched)
        self.signals, self.interval, self.step = StopSignals(world), Interval(), 0
        self.saved: Path | None = None
        self.directory: RunDirectory | None = None
        self.in_flight = InFlight(config, world, self.parts, self.signals)

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def training_step(self) -> dict[str, float]:
        """One step: draws its batches, updates every part, and returns figures for the log."""

    @staticmethod
    def build_data(config: Config) -> tuple[TrainingData, ImageDataset]:
        """The training data, and the prompts of samples and scores. DataError lists every problem."""
        if config.data.images is not None:
            return build_captioned_training(config)
        dataset = setup.build_dataset(config)
        return dataset, setup.build_evaluation_dataset(config, dataset)

    @staticmethod  # noqa: B027  (most have nothing to add)
    def check_settings(config: Config, world: World) -> None:
        """Raises SettingsError for what a trainer cannot do under this configuration, whatever the data and weights."""

    def build_parts(self) -> dict[str, Part]:
        """What is trained, by the name it has in checkpoints and in the log."""
        return setup.build_parts(self.config, self.family, self.world, self.total_steps, self.strategy.shards)

    def prepare(self) -> None:  # noqa: B027  (most have nothing to do here)
        """Work before the first step, after an earlier run's state was loaded."""

    def judged(self) -> Subject | None:
        """What `judge` judges, once the data are read; None for nothing."""
        return None

    def judge(self) -> dict[str, Tensor]:
        """Figures [V] by name of what is `judged`, at each evaluation; their means are logged as `eval/<name>`."""
        return {}

    def validate(self) -> dict[str, float]:
        """The means of `judge`."""
        return {name: values.mean().item() for name, values in self.judge().items()}

    def images_of(self, items: int) -> int:
        """Images that a step trains on that draws so many items, over all processes."""
        return items

    def after_step(self) -> list[str]:
        """Once a step is whole and can no longer be dropped; returns lines to tell of it besides its figures."""
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

    def train(self, directory: RunDirectory | None = None) -> TrainResult:
        """Runs to `total_steps`, the first stop signal or a monitor that stops it; always leaves a checkpoint of where
        it stopped. The run `directory` is taken, and given back, where the caller does not hold it already.

        A stop is acted on at once where the work in flight can be dropped without a trace: in an evaluation, and in a
        training step up to its first optimizer step. A resume then draws that step, or that evaluation, again. A step
        that has changed weights is finished first. An error stops the run in the same way, and is raised at the end.
        """
        own = held_run_directory(self.config, self.world, lambda: self.resume)
        with own if directory is None else nullcontext(directory) as held:
            resumed = self._open(held)
            with self.logger:
                return self._run(resumed)

    def _run(self, resumed: bool) -> TrainResult:
        stopped, unsaved = False, ""
        with (
            self.signals,
            self.console.progress(self.total_steps, self.step, every=self.config.logging.log_interval) as progress,
        ):
            try:
                with self._stopping_together():
                    self.prepare()
                if resumed:
                    self.best.recall(self.step, self.evaluations.compared_since(self.step))
                recorded = self.evaluations.recorded(self.step) if resumed else None
                if recorded is None:
                    self._evaluate()
                elif self.evaluations.before is not None:  # the checkpoint is older than this evaluation
                    self.monitors.recall(self.step, recorded, self.evaluations.before, self.evaluations.shown_sources())
                while self.step < self.total_steps:
                    self._advance(progress)
            except StopRequested:
                stopped = True
                unsaved = self._save_where_it_stops()
        if self.signals.failure is not None:
            failure = as_failure(self.signals.failure)
            failure.shared = not self.signals.alone
            where = f"The run stopped after step {self.step} of {self.total_steps}"
            if self.signals.alone and not (self.world.is_main or unsaved):
                where += "; rank 0 saves that step, unless it is what has ended"
                raise ended(failure, where, self.config.checkpoint_dir())
            raise ended(failure, where if unsaved else f"{where} and nothing is lost", self.saved, unsaved)
        return self._finish(stopped)

    def _advance(self, progress: Progress) -> None:
        """One training step with what is due after it. Raises StopRequested, without a trace of a step dropped."""
        started = time.perf_counter()
        # a step that is dropped gives its prompts back: the resume draws them again
        place = self.sampler.state_dict()
        items = self.sampler.rows_ahead(self.config.training.gradient_accumulation_steps)
        self.in_flight.begin()
        try:
            with self._stopping_together():
                metrics = self.training_step()
        except StopRequested:
            self.sampler.load_state_dict(place)
            raise
        self.step += 1
        seconds = time.perf_counter() - started
        rate = {"images_per_second": Mean(self.images_of(items) / seconds, seconds)}
        self.interval.add({**rate, **metrics, "time/step_seconds": seconds})
        figures = self.interval.figures()
        self.in_flight.begin()  # the step is whole: what fails from here on takes nothing of it back
        stop = self._poll() or self._heed_monitors()
        last = self.step == self.total_steps
        if last or stop or self.step % self.config.logging.log_interval == 0:
            figures |= peak_memory(self.world)
            self.logger.log(self.step, figures)
        if self.step % self.config.logging.log_interval == 0:
            self.interval.clear()
        for remark in self.after_step():
            self._say(remark)
        with beside_training("drawing the progress bar"):
            progress.update(self.step, figures)
        if last or stop or self.step % self.config.logging.save_interval == 0:
            self.save()
        if stop:
            raise StopRequested
        self._evaluate()
        if self._heed_monitors():
            raise StopRequested

    def _poll(self) -> bool:
        """Whether a stop was asked for, or the other processes have died."""
        try:
            with self._stopping_together():
                return self.signals.poll()
        except StopRequested:
            return True

    def _heed_monitors(self) -> bool:
        """Tells what the monitors have to say; whether they stop the run."""
        for message in self.monitors.take_messages():
            self._say(f"warning: {message}")
        return self.monitors.halt is not None

    def _say(self, line: str) -> None:
        self.console.line(line)
        self.logger.text(line)

    def check_stop(self) -> None:
        """Raises StopRequested when a stop was asked for and the training step in flight can still be dropped. Every
        process must call it equally often between two optimizer steps."""
        self.in_flight.check()

    def update(self, part: Part) -> dict[str, float]:
        """The optimizer step of a half. From here on the training step is finished, whatever is asked."""
        return self.in_flight.update(part, self.step)

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Around a phase of the run: a full device or non-finite values in it are named so."""
        return guarded(name, self.config, self.world, self.step)

    def _stopping_together(self) -> AbstractContextManager[None]:
        return self.in_flight.stopping_together(self.step, self.total_steps, self.saved)

    def _save_where_it_stops(self) -> str:
        """Saves the last finished step, unless it is; why it could not be saved, where an error stops the run."""
        if self.saved == self._checkpoint() and self.monitors.halt is None:  # one may have tripped after the save
            return ""
        try:
            self.save()
        except TrainingError as error:
            if self.signals.failure is None:
                raise
            return str(error)
        return ""

    def _evaluate(self) -> None:
        if not self.evaluations.anything_due(self.step):
            return
        self.in_flight.begin()
        with self._stopping_together(), self.phase("evaluation"), self.autocast(), as_shown(self.parts, "evaluation"):
            judged = self.judge() if self.evaluations.judging_due(self.step) else {}
            found = self.evaluations.run(self.step, judged, self.logger, self.signals.check, self.signals.requested)
            before = self.evaluations.before
            if found is None or before is None or not (figures := self.evaluations.figures(found)):
                return
            if found.scores:
                figures |= self.monitors.after_evaluation(self.step, before, found, self.evaluations.shown_sources())
            self.logger.log(self.step, figures)  # one line, and the last thing written: it says that all is there
        self._keep_best(figures)

    def _keep_best(self, figures: dict[str, float]) -> None:
        """Has this step's checkpoint named the best where its evaluation is. Step 0 is no training's."""
        best = self.best.improved_by(self.step, figures) if self.step else None
        if best is not None:
            if self.saved != self._checkpoint():
                self.save()
            self.best.name(best)

    def _open(self, directory: RunDirectory) -> bool:
        """The run directory, the logger and, when asked, the state of an earlier run; whether there is one."""
        config, point, self.directory = self.config, self.resume, directory
        if point is not None:
            for skipped in point.skipped:
                self.console.line(f"passed over {skipped.path.name}: {skipped.reason}")
            self.load(load_checkpoint(point.path, verify=False))
            self.saved = point.path
            self.console.line(resumed_line(config, point.path, self.step, self.total_steps))
        opening = opening_lines(config, self.world, len(self.dataset), self.total_steps)
        for line in [*opening, *(f"note: {note}" for note in self.notes)]:
            self.console.line(line)
        self.logger = directory.open(config, self.world, self.total_steps, shared=self.strategy.shards is not None)
        for note in self.notes:
            self.logger.text(note)
        return point is not None

    def next_batch(self) -> tuple[Any, list[int]]:
        """The next batch of this process, of the kind its data has, and its items' places in the run's sequence of
        samples."""
        positions, epochs = self.sampler.peek_positions(), self.sampler.peek_epochs()
        indices = self.sampler.next()
        self.in_flight.drawn.append(Drawn(indices, positions))
        batch = self.dataset.batch(indices, epoch=epochs)
        self.dataset.prefetch(self.sampler.peek(), epoch=self.sampler.peek_epochs())
        return batch, positions

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
        self.best.tell(self.console)
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, StateTree]:
        """Every named state of the run, as far as `checkpoint.save_optimizer` wants it."""
        trainer: dict[str, Any] = {"step": self.step, "before": self.evaluations.state()}
        trainer |= {"interval": self.interval.state(), "total_steps": self.total_steps}
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
        self.notes += moved_schedules(self.config, trainer["total_steps"], self.total_steps)
        self.sampler.load_state_dict(cast(dict[str, int], state["sampler"]))
        self.monitors.load(cast(dict[str, Any], state.get("monitors", {})))
        for part in self.parts.values():
            part.load_state(state)
        self.load_extra_state(state)

    def save(self) -> None:
        """Commits a checkpoint of this step. Where that fails every process raises why."""
        if self.signals.alone and self.strategy.shards is not None:
            raise TrainingError("the shards of the processes that have ended are lost with them")
        if self.signals.alone and not self.world.is_main:  # nobody says whether there is one
            return
        failure: TrainingError | None = None
        if self.world.is_main or self.strategy.shards is not None:
            try:
                with losses_explained(self.world), self.phase("saving"):
                    path = commit(
                        self.world,
                        self.config,
                        self.family,
                        self.step,
                        self.state(),
                        parts=self.parts,
                        directory=self.directory,
                        best=self.best,
                        exports=self.exports(),
                        digests=self.digests,
                    )
                if path is not None:
                    self.after_save(path)
                    self.logger.text(f"saved {path}")
            except Exception as error:  # the other processes wait for this one's word, whatever it met
                failure = as_failure(error)
                if not (self.world.is_main or failure.shared):  # they wait for its shards
                    raise ended(failure, f"Step {self.step} was not saved", self.saved) from error
        if not self.signals.alone:
            failure = broadcast_object(self.world, failure)
        if failure is not None:
            failure.shared = True
            raise failure
        self.saved = self._checkpoint()

    def _checkpoint(self) -> Path:
        return self.config.checkpoint_dir() / checkpoint_name(self.step)
