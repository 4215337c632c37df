"""The directory of a run: what is laid out in it before the first step, and the log that is kept there."""

from __future__ import annotations

from glm_training.checkpoint.commit import begin_run, continue_run
from glm_training.checkpoint.resume import ResumePoint
from glm_training.config import Config, resolved_yaml
from glm_training.engine.summary import EVALUATIONS
from glm_training.utils.distributed import World, barrier
from glm_training.utils.logging import RunLogger
from glm_training.utils.step_lines import keep_until


def open_run_directory(config: Config, world: World, point: ResumePoint | None, total_steps: int) -> RunLogger:
    """Lays out the directory of a run that starts, or goes on after `point`, and opens its log; a collective.

    A run that goes on within an interval of the log goes on with its figures too, so the line that the stop left of
    them is set aside: the interval gets the one line that it has without a stop.
    """
    step = None if point is None else point.step
    within = step is not None and step < total_steps and step % config.logging.log_interval != 0
    if world.is_main:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
        if point is not None and point.path.parent.resolve() == config.checkpoint_dir().resolve():
            continue_run(point.path)
        else:
            begin_run(config.checkpoint_dir())
        keep_until(config.output_dir / EVALUATIONS, -1 if step is None else step)
    logger = RunLogger(
        config.output_dir,
        world,
        use_tensorboard=config.logging.use_tensorboard,
        use_wandb=config.logging.use_wandb,
        wandb_project=config.logging.wandb_project,
        wandb_entity=config.logging.wandb_entity,
        wandb_mode=config.logging.wandb_mode,
        log_dir=config.tensorboard_dir(),
        resume_step=step,
        within_interval=within,
        config=config.model_dump(mode="json"),
    )
    barrier(world)
    return logger
