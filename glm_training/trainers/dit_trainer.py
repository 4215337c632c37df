"""Supervised finetuning of the DiT half."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.trainers.supervised_trainer import SupervisedTrainer
from glm_training.utils.distributed import World


class DiTTrainer(SupervisedTrainer):
    """Flow matching under the real image's prior tokens, with condition dropout for guidance."""

    def __init__(self, config: Config, world: World) -> None:
        if config.parts() != ("dit",):
            raise ValueError(f"DiTTrainer trains model.component dit, not {config.model.component}")
        super().__init__(config, world)
