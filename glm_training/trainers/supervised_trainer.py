"""Supervised finetuning of one half or both."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.models.glm_image.family import GLMImage
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.supervision import Supervision
from glm_training.utils.distributed import World


class SupervisedTrainer(BaseTrainer):
    """Trains whatever `model.component` names on the target images."""

    family: GLMImage

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        self.supervision = Supervision(config, self.family)

    def training_step(self) -> dict[str, float]:
        return self.supervision.step(self)
