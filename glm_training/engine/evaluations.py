"""A run's held-out scores and sample images: when they are due, how they are drawn, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_training.config import Config, compared
from glm_training.data import ImageDataset
from glm_training.engine import setup
from glm_training.engine.held_out_metrics import HeldOutMetrics
from glm_training.engine.summary import EVALUATIONS, scores_of, write_pictures, write_summary
from glm_training.evaluation.held_out import Evaluation, draw, evaluate
from glm_training.models.family import Family
from glm_training.rewards import RewardCalculator
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, broadcast_object
from glm_training.utils.failures import beside_training
from glm_training.utils.logging import RunLogger
from glm_training.utils.metrics_file import METRICS
from glm_training.utils.pictures import save_image
from glm_training.utils.step_lines import StepLines, has_step


class Evaluations:
    """`before`: the first scores of the run, taken at `before_step`; `after`: the newest ones.

    `settings` names all that scores depend on besides the model. Scores taken under other settings are not compared: a
    run that resumes under new ones takes its first scores anew, at the step where it resumes.
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
        watched: HeldOutMetrics | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.console = console
        self.family = family
        self.held_out = held_out
        self.calculator = calculator if config.evaluation.enabled else None
        self.watched = watched
        self.total_steps = total_steps
        self.settings = scoring_settings(config, held_out)
        self.before: Evaluation | None = None
        self.before_step = 0
        self.after: Evaluation | None = None
        self.lines = StepLines(config.output_dir / EVALUATIONS)

    # -- when ----------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the run evaluates after `step` steps."""
        return step == self.total_steps or step % self.config.logging.eval_interval == 0

    def scores_due(self, step: int) -> bool:
        """Whether held-out scores are taken after `step` steps."""
        return self.calculator is not None and self.due(step)

    def samples_due(self, step: int) -> bool:
        """Whether sample images are written after `step` steps."""
        interval = self.config.logging.sample_every()
        return interval is not None and (step == self.total_steps or step % interval == 0)

    def lacking(self, step: int, *, validates: bool) -> bool:
        """Whether a run that resumes at `step` has to evaluate first: it has no first scores, or the run before it was
        stopped before it evaluated there. `validates`: whether it also logs figures of held-out data."""
        if self.calculator is not None and self.before is None:
            return True
        return broadcast_object(self.world, not self._recorded(step, validates))

    def _recorded(self, step: int, validates: bool) -> bool:
        if validates and self.due(step) and not has_step(self.config.output_dir / METRICS, step, prefix="eval/"):
            return False
        scored = has_step(self.config.output_dir / EVALUATIONS, step)
        drawn = (self.samples_dir(step) / "prompts.txt").is_file()
        return (scored or not self.scores_due(step)) and (drawn or not self.samples_due(step))

    # -- how -----------------------------------------------------------------------------------------------------------

    def run(
        self, step: int, logger: RunLogger, on_step: Callable[[], None], stopped: Callable[[], bool]
    ) -> Evaluation | None:
        """Scores and sample images, both or either, as they are due; the first scores of a run always are. Returns
        the scores, where there are some.

        `on_step` is called throughout, equally often on every process, and may raise to abandon the evaluation;
        `stopped` is asked while pictures are scored, and ends that with ScoringStopped.
        """
        drawn, scores = self.samples_due(step), None
        if self.scores_due(step) or (self.calculator is not None and self.before is None):
            scores = self._score(step, logger, on_step, stopped)
            images = scores.images
        elif drawn:
            images = self._draw(on_step)
        else:
            return None
        if drawn and self.world.is_main:
            with beside_training("writing the pictures of samples"):
                self._write(step, images, logger)
        return scores

    def _score(
        self, step: int, logger: RunLogger, on_step: Callable[[], None], stopped: Callable[[], bool]
    ) -> Evaluation:
        assert self.calculator is not None
        self.family.eval()
        self.after = evaluate(
            self.family,
            self.calculator,
            self.held_out.batch(range(len(self.held_out))),
            setup.evaluation_settings(self.config),
            self.world,
            keep_images=self.config.logging.num_log_images,
            on_step=on_step,
            stopped=stopped,
            also=None if self.watched is None else self.watched.scores,
        )
        if self.before is None:
            self.before, self.before_step = self.after, step
        means = {f"eval/{name}": value for name, value in self.after.means().items()}
        logger.log(step, means)
        if self.world.is_main:
            self.lines.append(scores_of(step, self.held_out, self.after))
        self.console.line("held-out " + "  ".join(f"{k[5:]} {v:.3f}" for k, v in means.items()))
        return self.after

    def _draw(self, on_step: Callable[[], None]) -> Tensor:
        rows = range(min(self.config.logging.num_log_images, len(self.held_out)))
        self.family.eval()
        settings = setup.evaluation_settings(self.config)
        return draw(self.family, self.held_out.batch(rows), rows, settings, samples=1, on_step=on_step).cpu()

    def _write(self, step: int, images: Tensor, logger: RunLogger) -> None:
        prompts = [example.prompt for example in self.held_out.examples[: len(images)]]
        folder = self.samples_dir(step)
        for i, image in enumerate(images):
            save_image(folder / f"{i}.png", image)
        columns = {f"step {step}": images}
        if self.before is not None and self.before_step < step:
            columns = {f"step {self.before_step}": self.before.images, **columns}
        write_pictures(folder / "grid.png", self.held_out, columns)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        logger.images(step, "samples", images, prompts)

    def samples_dir(self, step: int) -> Path:
        """Where the pictures of a step go."""
        return self.config.output_dir / "samples" / f"step-{step:06d}"

    # -- what is kept --------------------------------------------------------------------------------------------------

    def compared(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """Means by metric before and after, with the table and the picture of both; empty unless the run is complete
        and was evaluated at two steps."""
        if self.before is None or self.after is None or not self.before_step < step == self.total_steps:
            return {}, {}
        self.lines.write_waiting()
        if self.world.is_main:
            write_summary(self.console, self.config, self.held_out, self.before, self.after, self.before_step)
        return self.before.means(), self.after.means()

    def state(self) -> dict[str, Any] | None:
        """The first scores and the pictures shown beside them (8 bits), for a checkpoint."""
        if self.before is None:
            return None
        levels = self.before.images.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
        return {
            "step": self.before_step,
            "scores": dict(self.before.scores),
            "images": levels,
            "settings": self.settings,
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Takes what `state` gave, unless the scores in it were taken under other settings: then says so."""
        if state is None:
            return
        changes = _changes(state["settings"], self.settings)
        if changes:
            self.console.line(
                f"note: the scores of step {state['step']} were taken under other settings ({'; '.join(changes)}) and "
                "are not compared with new ones: the run takes its first scores anew where it resumes"
            )
            return
        self.before = Evaluation(state["scores"], state["images"].float() / 255)
        self.before_step = state["step"]


def scoring_settings(config: Config, held_out: ImageDataset) -> dict[str, Any]:
    """Everything that held-out scores depend on besides the model, by key where one says it."""
    sampling, reward = config.evaluation_sampling(), config.reward
    return {
        "evaluation.num_eval_samples": len(held_out),
        "evaluation.samples_per_prompt": config.evaluation.samples_per_prompt,
        "evaluation.seed": config.evaluation.seed,
        "evaluation.num_inference_steps": sampling.num_inference_steps,
        "evaluation.guidance_scale": sampling.guidance_scale,
        "model.ar.temperature": sampling.temperature,
        "model.ar.top_p": sampling.top_p,
        "model.ar.do_sample": sampling.do_sample,
        "data.image_size": [config.data.image_size.height, config.data.image_size.width],
        "reward.metrics": config.scored_weights(),
        "reward.calculator": reward.calculator,
        "reward.options": compared(config)["reward"]["options"],
        "reward.monitors.metrics": list(reward.monitors.metrics),
        "prompts and images": held_out.fingerprint()[:12],
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = dict.fromkeys((*before, *now))
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
