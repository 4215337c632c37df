"""A run's scores and pictures: when they are due, how they are drawn, and what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_training.config import Config, compared
from glm_training.data import ImageDataset
from glm_training.data.dataset import sizes_of
from glm_training.engine import setup
from glm_training.engine.families import evaluation_sampling
from glm_training.engine.gap import TrainingRewards
from glm_training.engine.summary import images_of, scores_of, told, write_pictures, write_summary
from glm_training.engine.validation import Subject, by_size
from glm_training.evaluation.held_out import Evaluation, EvaluationSettings, combined, draw, evaluate
from glm_training.models.family import Family
from glm_training.rewards import RewardBatch, RewardCalculator
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, broadcast_object
from glm_training.utils.failures import beside_training
from glm_training.utils.logging import RunLogger
from glm_training.utils.metrics_file import EVALUATIONS, METRICS
from glm_training.utils.pictures import Pictures, as_saved, each, save_image
from glm_training.utils.prompt_lines import PROMPTS, write_prompts
from glm_training.utils.step_folders import step_folder
from glm_training.utils.step_lines import StepLines, keep_until, line_of
from glm_training.utils.words import number

Scorer = Callable[[RewardBatch], dict[str, Tensor]]
"""Scores [B] of pictures by name, NaN where one does not apply, which count in no total."""


class Evaluations:
    """`before`: the first evaluation of the run, taken at `before_step`; `after`: the newest one.

    `judged`: what the trainer judges besides pictures, None for nothing. `also`: scorers beside the calculator.
    `training`: the rewards of training prompts that the scores are held against; a trainer with rewards adds to them.
    `settings` names all that an evaluation depends on besides the model. Those taken under other settings are not
    compared: a run that resumes under new ones takes its first one anew, at the step where it resumes.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        console: Console,
        family: Family,
        held_out: ImageDataset,
        calculator: RewardCalculator | None,
        total_steps: int,
        judged: Subject | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.console = console
        self.family = family
        self.held_out = held_out
        self.calculator = calculator if config.evaluation.enabled else None
        self.judged = judged if config.evaluation.enabled else None
        self.also: dict[str, Scorer] = {}
        self.total_steps = total_steps
        self.before: Evaluation | None = None
        self.before_step = 0
        self.after: Evaluation | None = None
        self.training = TrainingRewards(config.reward.monitors.window)
        self.lines = StepLines(config.output_dir / EVALUATIONS)

    def add_scorer(self, name: str, scorer: Scorer) -> None:
        """From here on pictures are scored by `scorer` too, of which `name` tells."""
        if self.config.evaluation.enabled:
            self.also[name] = scorer

    @property
    def scores_pictures(self) -> bool:
        """Whether an evaluation scores pictures."""
        return self.calculator is not None or bool(self.also)

    # -- when ----------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the run evaluates after `step` steps."""
        return step == self.total_steps or step % self.config.logging.eval_interval == 0

    def judging_due(self, step: int) -> bool:
        """Whether held-out pairs or targets are judged after `step` steps; the first time is always due."""
        return self.judged is not None and (self.due(step) or self.before is None)

    def scores_due(self, step: int) -> bool:
        """Whether pictures are scored after `step` steps; the first time is always due."""
        return self.scores_pictures and (self.due(step) or self.before is None)

    def samples_due(self, step: int) -> bool:
        """Whether sample images are written after `step` steps."""
        interval = self.config.logging.sample_every()
        return interval is not None and (step == self.total_steps or step % interval == 0)

    def anything_due(self, step: int) -> bool:
        """Whether `run` has anything to do after `step` steps."""
        return self.judging_due(step) or self.scores_due(step) or self.samples_due(step)

    def recorded(self, step: int) -> dict[str, float | None] | None:
        """What the log has of the evaluation after `step` steps, in a run that resumes there: a collective. None where
        it is to be made: the run was stopped before it was whole, or has no first one."""
        line = broadcast_object(self.world, self._line(step) if self.world.is_main else None)
        evaluates = self.scores_pictures or self.judged is not None
        return None if evaluates and self.before is None else line

    def compared_since(self, step: int) -> int:
        """From which step on evaluations can be compared with those to come, in a run that resumes after `step`."""
        return step + 1 if self.before is None else self.before_step

    def _line(self, step: int) -> dict[str, float | None] | None:
        folder = self.config.output_dir
        line: dict[str, float | None] | None = {}
        if self.due(step) and (self.scores_pictures or self.judged is not None):
            line = line_of(folder / METRICS, step, prefix="eval/")  # written last
        elif self.samples_due(step) and not (self.samples_dir(step) / PROMPTS).is_file():
            line = None
        if line is None:
            with beside_training(f"cutting {EVALUATIONS} back"):
                keep_until(folder / EVALUATIONS, step - 1)
        return line

    # -- how -----------------------------------------------------------------------------------------------------------

    def run(
        self,
        step: int,
        judged: dict[str, Tensor],
        logger: RunLogger,
        on_step: Callable[[], None],
        stopped: Callable[[], bool],
    ) -> Evaluation | None:
        """Scores and sample images, both or either, as they are due, with the figures of what was `judged`; None
        without any of them.

        `on_step` is called throughout, equally often on every process, and may raise to abandon the evaluation;
        `stopped` is asked while pictures are scored, and ends that with ScoringStopped.
        """
        drawn = self.samples_due(step)
        if self.scores_due(step):
            evaluation = self._score(on_step, stopped)
        elif drawn:
            evaluation = Evaluation({}, self._draw(on_step))
        elif judged:
            evaluation = Evaluation({}, torch.empty(0, 3, 1, 1))
        else:
            return None
        # in 8 bits, as a checkpoint keeps them: a resumed run compares with the same pictures
        evaluation = replace(evaluation, images=each(evaluation.images, as_saved), judged=judged)
        if self.before is None:
            self.before, self.before_step = evaluation, step
        if self.due(step):
            self.after = evaluation
        if drawn and self.world.is_main:
            with beside_training("writing the pictures of samples"):
                self._write(step, evaluation, logger)
        if self.world.is_main:
            for line in scores_of(self.subjects(), step, evaluation):
                self.lines.append(line)
        for text in told(self.subjects(), evaluation):
            self.console.line(text)
        return evaluation

    def subjects(self) -> tuple[Subject, Subject | None]:
        """What is drawn for, and what is judged besides."""
        prompts = tuple(example.prompt for example in self.held_out.examples)
        return Subject(setup.evaluated(self.config, "prompt"), prompts, self.held_out.fingerprint()), self.judged

    def shown_sources(self) -> Pictures | None:
        """The source images of the pictures that are kept, in i2i."""
        kept = min(self.config.logging.num_log_images, len(self.held_out))
        return images_of(self.held_out, kept)[0] or None

    def _score(self, on_step: Callable[[], None], stopped: Callable[[], bool]) -> Evaluation:
        def also(batch: RewardBatch) -> dict[str, Tensor]:
            return {name: values for scorer in self.also.values() for name, values in scorer(batch).items()}

        self.family.eval()
        kept = self.config.logging.num_log_images
        groups, found = by_size(sizes_of(self.held_out)), []
        running = Running(self.console.line, len(self.held_out), self.config.evaluation.samples_per_prompt)
        for rows in groups:
            evaluation = evaluate(
                self.family,
                self.calculator,
                self.held_out.batch(rows),
                evaluation_settings(self.config, self.held_out.size_of(rows[0])),
                self.world,
                keep_images=sum(row < kept for row in rows),
                on_step=on_step,
                stopped=stopped,
                also=also,
                on_scored=running.scored,
            )
            running.finished(len(rows))
            found.append(evaluation)
        return found[0] if len(found) == 1 else combined(groups, found)

    def _draw(self, on_step: Callable[[], None]) -> Pictures:
        kept = min(self.config.logging.num_log_images, len(self.held_out))
        self.family.eval()
        groups = by_size(sizes_of(self.held_out)[:kept])
        drawn = [
            draw(
                self.family,
                self.held_out.batch(rows),
                range(len(rows)),
                evaluation_settings(self.config, self.held_out.size_of(rows[0])),
                samples=1,
                on_step=on_step,
            ).cpu()
            for rows in groups
        ]
        if len(drawn) == 1:
            return drawn[0]
        return combined(groups, [Evaluation({}, images) for images in drawn]).images

    def _write(self, step: int, evaluation: Evaluation, logger: RunLogger) -> None:
        images = evaluation.images
        prompts = [example.prompt for example in self.held_out.examples[: len(images)]]
        folder = self.samples_dir(step)
        for i, image in enumerate(images):
            save_image(folder / f"{i}.png", image)
        columns = {f"step {step}": evaluation}
        if self.before is not None and self.before_step < step and len(self.before.images):
            columns = {f"step {self.before_step}": self.before, **columns}
        write_pictures(folder / "grid.png", self.held_out, columns, setup.evaluated(self.config, "prompt"))
        write_prompts(folder, prompts)
        logger.images(step, "samples", images, prompts)

    def samples_dir(self, step: int) -> Path:
        """Where the pictures of a step go."""
        return step_folder(self.config.output_dir / "samples", step)

    def figures(self, found: Evaluation) -> dict[str, float]:
        """What is logged of an evaluation: its means, and how far the rewards of training prompts are from them."""
        gaps = {} if self.before is None else self.training.gaps(self.before, found)
        return {f"eval/{name}": value for name, value in found.means().items()} | gaps

    # -- what is kept --------------------------------------------------------------------------------------------------

    def compared(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """Means by figure before and after, with the table and the picture of both; empty unless the run is complete
        and was evaluated at two steps."""
        if self.before is None or self.after is None or not self.before_step < step == self.total_steps:
            return {}, {}
        self.lines.write_waiting()
        if self.world.is_main:
            write_summary(
                self.console, self.config, self.held_out, self.subjects(), self.before, self.after, self.before_step
            )
            with beside_training("the table of the gap between training and evaluation prompts"):
                self.training.write_table(self.console, self.subjects()[0], self.before, self.after)
        return self.before.means(), self.after.means()

    def state(self) -> dict[str, Any] | None:
        """The first evaluation, with its pictures in 8 bits, for a checkpoint."""
        if self.before is None:
            return None
        return {
            "step": self.before_step,
            "scores": dict(self.before.scores),
            "judged": dict(self.before.judged),
            "shown": dict(self.before.shown),
            "images": each(self.before.images, lambda images: images.mul(255).round().to(torch.uint8)),
            "settings": self._settings(),
            "training": self.training.state(),
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Takes what `state` gave, unless it was taken under other settings: then says so."""
        if state is None:
            return
        changes = _changes(state["settings"], self._settings())
        if changes:
            self.console.line(
                f"note: the scores of step {state['step']} were taken under other settings ({'; '.join(changes)}) and "
                "are not compared with new ones: the run takes its first scores anew where it resumes"
            )
            return
        self.before = Evaluation(
            state["scores"],
            each(state["images"], lambda images: images.float() / 255),
            state["judged"],
            state.get("shown", {}),  # which older checkpoints lack
        )
        self.before_step = state["step"]
        if "training" in state:  # which older checkpoints lack
            self.training.load(state["training"])

    def _settings(self) -> dict[str, Any]:
        judged = None if self.judged is None else f"{self.judged} ({self.judged.digest[:12]})"
        settings = scoring_settings(self.config, self.held_out)
        if self.calculator is not None and not self.config.names_metrics():
            settings["reward.metrics"] = dict(self.calculator.weights)  # those that can be had here
        return {**settings, "scorers": list(self.also), "judged": judged}


class Running:
    """Says how far an evaluation is and its reward so far: after the first pictures, so that a run shows soon that it
    does something, then at most once per quarter, and never twice within PAUSE seconds or for the last ones, which the
    result follows."""

    PAUSE = 2.0

    def __init__(self, line: Callable[[str], None], prompts: int, samples: int) -> None:
        """Of an evaluation of `prompts` x `samples` pictures."""
        self._line, self._prompts, self._samples = line, prompts, samples
        self._before, self._told = 0, 0  # prompts of the sizes that are finished; those at the last line
        self._sum, self._count = 0.0, 0
        self._since = time.monotonic()

    def scored(self, done: int, totals: Tensor | None) -> None:
        """`done` prompts of the pictures of this size are finished, the last with these `totals`."""
        if totals is not None:
            self._sum += totals.nansum().item()
            self._count += int((~totals.isnan()).sum())
        done, now = self._before + done, time.monotonic()
        quarter = self._told == 0 or 4 * (done - self._told) >= self._prompts
        if done >= self._prompts or not quarter or now - self._since < self.PAUSE:
            return
        self._told, self._since = done, now
        reward = f", reward {number(self._sum / self._count)} so far" if self._count else ""
        self._line(f"evaluating: {done * self._samples} of {self._prompts * self._samples} images{reward}")

    def finished(self, prompts: int) -> None:
        """All `prompts` of one size are."""
        self._before += prompts


def scoring_settings(config: Config, held_out: ImageDataset) -> dict[str, Any]:
    """Everything that scores of pictures depend on besides the model, by key where one says it."""
    sampling, reward = config.evaluation_sampling(), config.reward
    return {
        "evaluation.num_eval_samples": len(held_out),
        "evaluation.samples_per_prompt": config.evaluation.samples_per_prompt,
        "evaluation.seed": config.evaluation.seed,
        "evaluation.num_inference_steps": sampling.num_inference_steps,
        "evaluation.guidance_scale": sampling.guidance_scale,
        "model.generator.parallel": sampling.parallel,
        "model.ar.temperature": sampling.temperature,
        "model.ar.top_p": sampling.top_p,
        "model.ar.do_sample": sampling.do_sample,
        "data.image_size": [config.data.image_size.height, config.data.image_size.width],
        **({"data.buckets": config.data.buckets.model_dump(mode="json")} if config.data.buckets.enabled else {}),
        "reward.metrics": config.scored_weights(),
        "reward.calculator": reward.calculator,
        "reward.options": compared(config)["reward"]["options"],
        "reward.monitors.metrics": list(reward.monitors.metrics),
        "prompts and images": held_out.fingerprint()[:12],
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = dict.fromkeys((*before, *now))
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def evaluation_settings(config: Config, size: tuple[int, int]) -> EvaluationSettings:
    """How the pictures of evaluations are drawn that have a size."""
    return EvaluationSettings(
        height=size[0],
        width=size[1],
        samples=config.evaluation.samples_per_prompt,
        seed=config.evaluation.seed,
        sampling=evaluation_sampling(config),
        micro_batch_size=config.rollout.micro_batch_size,
        vae_batch_size=config.rollout.vae_batch_size,
    )
