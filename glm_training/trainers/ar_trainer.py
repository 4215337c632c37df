"""Supervised finetuning of the AR half."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.trainers.supervised_trainer import SupervisedTrainer
from glm_training.utils.distributed import World


class ARTrainer(SupervisedTrainer):
    """Cross-entropy on the tokens of the target image; preview and large grid are logged apart."""

    def __init__(self, config: Config, world: World) -> None:
        if config.parts() != ("ar",):
            raise ValueError(f"ARTrainer trains model.component ar, not {config.model.component}")
        super().__init__(config, world)
