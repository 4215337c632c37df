"""What trainers have in common whose frozen encoders look at each picture and text once."""

from __future__ import annotations

from contextlib import nullcontext

from glm_training.config import Config
from glm_training.data import ImageDataset
from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.encoding.batches import coming, survey
from glm_training.engine.families import build_encoder
from glm_training.engine.preparation import Prepared
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World, gather_objects


class EncodingTrainer(BaseTrainer):
    """Encodes what its steps see before the first of them; the encoders then sleep, but while anything is drawn.

    Target images are encoded where they are learnt from; a reward only compares with them.
    """

    def __init__(self, config: Config, world: World, prepared: Prepared) -> None:
        super().__init__(config, world, prepared)
        encoder = build_encoder(config, self.family)
        self.encoding = Encoding(config, world, encoder, pictures=not config.crops_at_random())

    def prepare(self) -> None:
        """Fills the cache; what is encoded need not be decoded again, unless a reward looks at it."""
        if self.encoding.cache is None:
            return
        training = self.dataset
        assert isinstance(training, ImageDataset | CaptionedImages)
        supervised = self.config.uses_supervision()
        with self.phase("encoding"):
            indices = self._drawn()
            if isinstance(training, CaptionedImages):
                survey(training, self.encoding, indices, self.console, self.signals.check)
            pictures, prompts = coming(training, indices, targets=supervised)
            judged, others = coming(self.held_out, targets=True) if supervised else ({}, [])
            self.encoding.fill(pictures | judged, [*prompts, *others], self.console, self.signals.check)
        training.decodes = self.config.uses_reward() or not self.encoding.keeps_pictures

    def meet(self) -> None:
        """`check_stop` where the halves lie in shards: about to be gathered, for which each process must have come
        this far."""
        if self.strategy.shards is not None:
            self.check_stop()

    def _drawn(self) -> list[int] | None:
        """The items that this run still comes to, on any process; None where that may be all."""
        draws = (self.total_steps - self.step) * self.config.training.gradient_accumulation_steps
        if draws * self.sampler.global_batch_size >= len(self.dataset):
            return None
        return sorted({index for own in gather_objects(self.world, self.sampler.coming(draws)) for index in own})

    def _evaluate(self) -> None:
        draws = self.evaluations.scores_due(self.step) or self.evaluations.samples_due(self.step)
        with self.encoding.awake() if draws else nullcontext():
            super()._evaluate()
