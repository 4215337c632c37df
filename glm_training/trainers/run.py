"""Which trainer a configuration asks for."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.engine import preparation
from glm_training.engine.agreement import agree_on_settings, losses_explained, together
from glm_training.engine.families import fetch_tokenizers
from glm_training.engine.phases import guarded
from glm_training.engine.preparation import Prepared
from glm_training.trainers.base_trainer import BaseTrainer, TrainResult
from glm_training.trainers.dmdr_trainer import DMDRTrainer
from glm_training.trainers.dpo_trainer import DPOTrainer
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.trainers.supervised_trainer import ARTrainer, DiTTrainer, SupervisedTrainer
from glm_training.utils.distributed import World, init_world, shutdown


def trainer_type(config: Config) -> type[BaseTrainer]:
    """Preference tuning, distillation, reward training when the configuration uses rewards, else supervised training of
    the chosen halves."""
    if config.training.method == "dpo":
        return DPOTrainer
    if config.training.method == "dmdr":
        return DMDRTrainer
    if config.uses_reward():
        return RewardTrainer
    trainers: dict[str, type[BaseTrainer]] = {"ar": ARTrainer, "dit": DiTTrainer, "both": SupervisedTrainer}
    return trainers[config.model.component]


def prepare(config: Config, world: World) -> Prepared:
    """All that a run needs besides the model, read and checked; a collective. Raises one of USER_ERRORS."""
    kind = trainer_type(config)
    return preparation.prepare(config, world, kind.build_data, kind.check_settings)


def build_trainer(config: Config, world: World) -> BaseTrainer:
    """The trainer with all that it composes: data, rewards and model are loaded and checked. A collective."""
    return trainer_type(config)(config, world, prepare(config, world))


def run_training(config: Config) -> TrainResult:
    """Joins the processes, sees to it that they agree, trains, and leaves them again."""
    enabled = config.distributed.enabled is not False
    world = init_world(enabled, config.distributed.backend, config.model.device_map)
    try:
        with losses_explained(world):
            agree_on_settings(config, world)
            with guarded("loading", config, world, 0):
                # small, and they tell what is wrong with prompts before any weights come
                together(world, "fetching the tokenizers", lambda: fetch_tokenizers(config))
                trainer = build_trainer(config, world)
            return trainer.train()
    finally:
        shutdown(world)
