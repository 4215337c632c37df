"""Which trainer a configuration asks for."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.engine.families import fetch_tokenizers
from glm_training.engine.phases import guarded
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


def build_trainer(config: Config, world: World) -> BaseTrainer:
    """The trainer with all that it composes: data, rewards and model are loaded and checked."""
    return trainer_type(config)(config, world)


def run_training(config: Config) -> TrainResult:
    """Joins the processes, trains, and leaves them again."""
    enabled = config.distributed.enabled is not False
    world = init_world(enabled, config.distributed.backend, config.model.device_map)
    try:
        with guarded("loading", config, world, 0, None):
            fetch_tokenizers(config)  # small, and they tell what is wrong with prompts before any weights come
            trainer = build_trainer(config, world)
        return trainer.train()
    finally:
        shutdown(world)
