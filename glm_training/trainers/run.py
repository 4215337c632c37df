"""Which trainer a configuration asks for."""

from __future__ import annotations

from functools import partial

from glm_training.config import Config
from glm_training.engine import preparation
from glm_training.engine.agreement import agree_on_settings, losses_explained
from glm_training.engine.phases import guarded
from glm_training.engine.places import place_problems
from glm_training.engine.preparation import Prepared
from glm_training.engine.run_directory import RunDirectory, chosen_point, held_run_directory
from glm_training.report.page import page, write_page
from glm_training.report.run import PAGE, read_runs
from glm_training.trainers.base_trainer import BaseTrainer, TrainResult
from glm_training.trainers.dmdr_trainer import DMDRTrainer
from glm_training.trainers.dpo_trainer import DPOTrainer
from glm_training.trainers.opd_trainer import OPDTrainer
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.trainers.supervised_trainer import ARTrainer, DiTTrainer, SupervisedTrainer
from glm_training.trainers.vgt_autoencoder_trainer import VGTAutoencoderTrainer
from glm_training.trainers.vgt_generator_trainer import VGTGeneratorTrainer
from glm_training.utils.console import Console
from glm_training.utils.distributed import World, any_flag, init_world, shutdown
from glm_training.utils.failures import beside_training
from glm_training.utils.metrics_file import METRICS


def trainer_type(config: Config) -> type[BaseTrainer]:
    """Preference tuning, distillation to few steps and of experts, VGT's two, reward training when the configuration
    uses rewards, else supervised training of the chosen halves."""
    if config.training.method == "dpo":
        return DPOTrainer
    if config.training.method == "dmdr":
        return DMDRTrainer
    if config.training.method == "opd":
        return OPDTrainer
    if config.model.family == "vgt":
        return VGTAutoencoderTrainer if config.model.component == "autoencoder" else VGTGeneratorTrainer
    if config.uses_reward():
        return RewardTrainer
    halves: dict[str, type[BaseTrainer]] = {"ar": ARTrainer, "dit": DiTTrainer}
    return halves.get(config.model.component, SupervisedTrainer)


def prepare(config: Config, world: World, directory: RunDirectory | None = None, *, loads: bool = True) -> Prepared:
    """All that a run needs besides the model, read and checked, as `engine.preparation.prepare` says; a collective.

    The checkpoint to resume from is that of the run's `directory`, where that is held already.
    """
    kind = trainer_type(config)
    choose = partial(chosen_point, config) if directory is None else lambda: directory.point
    return preparation.prepare(config, world, kind.build_data, kind.check_settings, choose, loads=loads)


def build_trainer(config: Config, world: World, directory: RunDirectory | None = None) -> BaseTrainer:
    """The trainer with all that it composes: data, rewards and model are loaded and checked. A collective."""
    prepared = prepare(config, world, directory)
    if directory is not None:
        directory.make_room(world)
    return trainer_type(config)(config, world, prepared)


def run_training(config: Config, *, overwrite: bool = False, auto: bool = False) -> TrainResult:
    """Joins the processes, sees to it that they agree, takes the run directory, trains, and leaves both again.

    `overwrite`, `auto`: see `held_run_directory`.
    """
    enabled = config.distributed.enabled is not False
    world = init_world(enabled, config.distributed.backend, config.model.device_map)
    try:
        with losses_explained(world):
            agree_on_settings(config, world)
            if any_flag(world, bool(place_problems(config, is_main=world.is_main))):
                prepare(config, world)  # raises, with all else that is wrong
            choose = partial(chosen_point, config, auto=auto)
            with held_run_directory(config, world, choose, overwrite=overwrite, auto=auto) as directory:
                with guarded("loading", config, world, 0):
                    trainer = build_trainer(config, world, directory)
                try:
                    return trainer.train(directory)
                finally:
                    write_report(config, world)
    finally:
        shutdown(world)


def write_report(config: Config, world: World) -> None:
    """The page of a run that has ended, in whatever way; on the main process. What fails does not end the run."""
    folder = config.output_dir
    if not (world.is_main and (folder / METRICS).is_file()):
        return
    with beside_training(f"making {PAGE}", f"`glm-train report {folder}` makes it"):
        write_page(folder / PAGE, page(read_runs([folder], ended=True), None))
        Console().line(f"report: {folder / PAGE}")
