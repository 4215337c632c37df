"""The only loop: step, log, sample, evaluate, save, stop on a signal. Subclasses say what a step is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from glm_training.checkpoint.commit import begin_run, save_checkpoint
from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config, resolved_yaml
from glm_training.data import Batch, StatefulSampler
from glm_training.evaluation.held_out import Evaluation, evaluate
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.lora import has_lora, save_lora
from glm_training.rewards import RewardCalculator
from glm_training.trainers import setup
from glm_training.trainers.parts import Part
from glm_training.trainers.resuming import check_drift, save_context
from glm_training.trainers.summary import append_scores, outline, trim_scores, write_summary
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, barrier, gather_objects
from glm_training.utils.logging import RunLogger
from glm_training.utils.pictures import save_image
from glm_training.utils.signals import StopSignals


@dataclass
class TrainResult:
    """What a finished run hands back. `before` and `after` are held-out means by metric, empty without evaluation."""

    step: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    stopped_by: int | None = None


class BaseTrainer(ABC):
    """Builds everything a run needs, then `train()`.

    Registered state: the trained weights and optimizers of each part, the sampler's place, the first evaluation.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.console = Console(enabled=world.is_main)
        self.dataset = setup.build_dataset(config)
        self.digests = self.dataset.example_digests()
        self.held_out = setup.build_evaluation_dataset(config, self.dataset)
        self.calculator: RewardCalculator | None = None
        self.notes: list[str] = []
        if setup.scores(config):
            named = setup.datasets_to_score(config, self.dataset, self.held_out)
            self.calculator, self.notes = setup.build_rewards(config, world, named)
        self.console.line(f"loading {config.model.name}")
        self.family: GLMImage = setup.build_family(config, world)
        self.sampler = StatefulSampler(
            len(self.dataset),
            config.training.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            rank=world.rank,
            world_size=world.world_size,
        )
        self.total_steps = self._count_steps()
        self.parts: dict[str, Part] = setup.build_parts(config, self.family, world, self.total_steps)
        self.step = 0
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def training_step(self) -> dict[str, float]:
        """One step: draws its batches, updates every part, and returns figures for the log."""

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Runs to `total_steps` or the first stop signal; always leaves a checkpoint of where it stopped."""
        self._open()
        with (
            StopSignals(self.world) as signals,
            self.console.progress(self.total_steps, self.step, every=self.config.logging.log_interval) as progress,
        ):
            self._evaluate_at(self.step, first=True)
            while self.step < self.total_steps:
                started = time.perf_counter()
                metrics = self.training_step()
                self.step += 1
                metrics["time/step_seconds"] = time.perf_counter() - started
                last = self.step == self.total_steps
                stop = signals.poll()
                if last or stop or self.step % self.config.logging.log_interval == 0:
                    self.logger.log(self.step, metrics)
                progress.update(self.step, metrics)
                if last or stop or self._is_due(self.config.logging.save_interval):
                    self.save()
                if stop and not last:
                    break
                if last or self._is_due(self.config.logging.eval_interval) or self._is_due(self._sample_every()):
                    self._evaluate_at(self.step)
        result = self._finish(signals.received if self.step < self.total_steps else None)
        self.logger.close()
        return result

    def _open(self) -> None:
        """The run directory, the logger and, when asked, the state of an earlier run."""
        config, resume = self.config, self.config.checkpoint.resume_from
        point = None
        if resume is not None:
            point = resolve_resume(config.checkpoint_dir(), resume)
            for skipped in point.skipped:
                self.console.line(f"passed over {skipped.path.name}: {skipped.reason}")
            check_drift(point, config, self.digests)
            self.load(load_checkpoint(point.path, verify=False))
            self.console.line(f"resumed from {point.path}, step {self.step} of {self.total_steps}")
        self.console.line(outline(config, self.world, len(self.dataset), self.total_steps))
        for note in self.notes:
            self.console.line(f"note: {note}")
        for part in self.parts.values():
            if part.settings.warmup_steps >= self.total_steps > 1:
                self.console.line(
                    f"note: the {part.name} half warms up for {part.settings.warmup_steps} steps and the run has "
                    f"{self.total_steps}: it never reaches its learning rate (training.warmup_steps)"
                )
        if self.world.is_main:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            (config.output_dir / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            if point is None or point.path.parent.resolve() != config.checkpoint_dir().resolve():
                begin_run(config.checkpoint_dir())
            trim_scores(config.output_dir / "evaluations.jsonl", self.step if point is not None else -1)
        self.logger = RunLogger(
            config.output_dir,
            self.world,
            use_tensorboard=config.logging.use_tensorboard,
            use_wandb=config.logging.use_wandb,
            wandb_project=config.logging.wandb_project,
            wandb_entity=config.logging.wandb_entity,
            wandb_mode=config.logging.wandb_mode,
            log_dir=config.tensorboard_dir(),
            resume_step=self.step if point is not None else None,
            config=config.model_dump(mode="json"),
        )
        for note in self.notes:
            self.logger.text(note)
        barrier(self.world)

    def _count_steps(self) -> int:
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        return -(-self.sampler.steps_for(training.num_epochs) // training.gradient_accumulation_steps)

    def _sample_every(self) -> int | None:
        return self.config.logging.sample_every()

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def next_batch(self) -> tuple[Batch, list[int]]:
        """The next prompts of this process, and their places in the run's sequence of samples."""
        first = self.sampler.position + self.world.rank * self.sampler.batch_size
        epochs = self.sampler.peek_epochs()
        indices = self.sampler.next()
        batch = self.dataset.batch(indices, epoch=epochs)
        self.dataset.prefetch(self.sampler.peek())
        return batch, list(range(first, first + len(indices)))

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward pass, in rollout and replay alike."""
        return setup.autocast(self.config, self.world)

    # -- evaluation and samples ----------------------------------------------------------------------------------------

    def _evaluate_at(self, step: int, *, first: bool = False) -> None:
        """Held-out scores and sample images, both or either, as the intervals say."""
        scored = self.calculator is not None and self.config.evaluation.enabled
        wanted = first or step == self.total_steps or self._is_due(self.config.logging.eval_interval)
        drawn = self.config.logging.log_images and (
            first or step == self.total_steps or self._is_due(self._sample_every())
        )
        if first and self.before is not None:
            return  # resumed: the run's own start was evaluated already
        if scored and wanted:
            self.after = self._evaluate(len(self.held_out))
            if first:
                self.before = self.after
            means = {f"eval/{name}": value for name, value in self.after.means().items()}
            self.logger.log(step, means)
            if self.world.is_main:
                append_scores(self.config.output_dir / "evaluations.jsonl", step, self.held_out, self.after)
            self.console.line("held-out " + "  ".join(f"{k[5:]} {v:.3f}" for k, v in means.items()))
            images = self.after.images
        elif drawn:
            images = self._draw_samples()
        else:
            return
        if drawn:
            self._write_samples(step, images[: self.config.logging.num_log_images])

    def _evaluate(self, count: int) -> Evaluation:
        assert self.calculator is not None
        self.family.eval()
        with self.autocast():
            return evaluate(
                self.family,
                self.calculator,
                self.held_out.batch(range(count)),
                setup.evaluation_settings(self.config),
                self.world,
            )

    def _draw_samples(self) -> Tensor:
        settings = setup.evaluation_settings(self.config)
        batch = self.held_out.batch(range(min(self.config.logging.num_log_images, len(self.held_out))))
        self.family.eval()
        with self.autocast():
            return self.family.generate(
                batch.prompts,
                height=settings.height,
                width=settings.width,
                sources=None if batch.sources is None else batch.sources.to(self.world.device),
                seed=settings.seed,
                temperature=settings.temperature,
                top_p=settings.top_p,
                do_sample=settings.do_sample,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                micro_batch_size=settings.micro_batch_size,
            ).cpu()

    def _write_samples(self, step: int, images: Tensor) -> None:
        if not self.world.is_main:
            return
        prompts = [example.prompt for example in self.held_out.examples[: len(images)]]
        folder = self.samples_dir(step)
        for i, image in enumerate(images):
            save_image(folder / f"{i}.png", image)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        self.logger.images(step, "samples", images, prompts)

    def samples_dir(self, step: int) -> Path:
        """Where the pictures of a step go."""
        folder = self.config.output_dir / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _finish(self, stopped_by: int | None) -> TrainResult:
        self.dataset.close()
        if stopped_by is not None:
            self.console.line(f"stopped after step {self.step} of {self.total_steps} and saved; --resume continues")
        result = TrainResult(self.step, stopped_by=stopped_by)
        if self.before is not None and self.after is not None and self.step == self.total_steps:
            result.before, result.after = self.before.means(), self.after.means()
            if self.world.is_main:
                write_summary(self.console, self.config, self.held_out, self.before, self.after)
        self.console.line(f"figures, samples and checkpoints: {self.config.output_dir}")
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, StateTree]:
        """Every named state of the run, as far as `checkpoint.save_optimizer` wants it."""
        trainer: dict[str, Any] = {"step": self.step}
        if self.before is not None:
            trainer["before"] = {"scores": dict(self.before.scores), "images": self.before.images}
        state: dict[str, StateTree] = {"trainer": trainer, "sampler": cast(StateTree, self.sampler.state_dict())}
        for part in self.parts.values():
            state |= part.state(with_optimizer=self.config.checkpoint.save_optimizer)
        return state

    def load(self, state: dict[str, StateTree]) -> None:
        """Continues from `state`, bit for bit on the CPU."""
        trainer = cast(dict[str, Any], state["trainer"])
        self.step = trainer["step"]
        if "before" in trainer:
            self.before = Evaluation(trainer["before"]["scores"], trainer["before"]["images"])
        self.sampler.load_state_dict(cast(dict[str, int], state["sampler"]))
        for part in self.parts.values():
            part.load_state(state)

    def save(self) -> None:
        """Commits a checkpoint of this step, from the main process."""
        config = self.config.checkpoint
        adapted = [name for name in self.parts if has_lora(self.family.module(cast(Any, name)))]
        if self.world.is_main:
            extra: dict[str, Any] = {}
            extra_bytes = 0
            if not (adapted and config.save_lora_only):
                extra_bytes = self.family.pipeline_bytes()
                extra["pipeline"] = lambda folder: self.family.save_pretrained(folder, merge_lora=bool(adapted))
            for name in adapted:
                extra[f"lora_{name}"] = lambda folder, n=name: save_lora(self.family.module(n), folder)
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
                    save_lora(
                        self.family.module(cast(Any, name)), self.config.lora_dir() / f"step-{self.step:06d}" / name
                    )
            self.logger.text(f"saved {path}")
        barrier(self.world)


def mean_over_processes(world: World, metrics: dict[str, float]) -> dict[str, float]:
    """Means of each figure over the processes that have it; the largest where the name ends in ``_max``."""
    rows = gather_objects(world, metrics)
    merged: dict[str, float] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row[name] for row in rows if name in row]
        merged[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return merged


def stack_means(metrics: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Row-weighted means of 0-dim tensors of many terms (the largest for ``_max``), read from the device once."""
    if not metrics:
        return {}
    names = list(dict.fromkeys(name for _, row in metrics for name in row))
    columns = []
    for name in names:
        have = [(rows, row[name].float()) for rows, row in metrics if name in row]
        values = torch.stack([value for _, value in have])
        weights = torch.tensor([float(rows) for rows, _ in have], device=values.device)
        columns.append(values.max() if name.endswith("_max") else (values * weights).sum() / weights.sum())
    return dict(zip(names, torch.stack(columns).tolist(), strict=True))
