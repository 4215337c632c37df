"""Preference pairs as the losses read them: latents, tokens and texts, encoded once or at every step.

B pairs in B or 2 B rows, latents [C, h, w], T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from glm_training.config import Config
from glm_training.data.examples import ImageRows, View
from glm_training.data.preference.dataset import (
    PairImage,
    PreferenceBatch,
    PreferenceDataset,
    PreferencePair,
    load_cropped,
    stack_rows,
)
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.encoding.encoder import Encoded
from glm_training.engine.families import Condition
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.utils.console import Console
from glm_training.utils.distributed import World


@dataclass
class EncodedPairs:
    """B pairs in 2 B rows, the preferred of every pair, then the rejected; in SFT the B preferred alone.

    clean: [rows, C, h, w] fp32 latents, with the condition of each; None where no part denoises. tokens: [rows, T]
    long, what the AR half writes for these images, with its prompt; None where it is not trained.
    """

    pairs: list[PreferencePair]
    clean: Tensor | None = None
    condition: Condition | None = None
    tokens: Tensor | None = None
    prompt: ARPrompt | None = None


class PairEncoder(ABC):
    """From pairs to what their losses read, through the frozen parts of a family, each image and prompt alone.

    An image that has changed since the start of the run is a DataError, never an entry under a name not its own. What
    is encoded once, and how the encoders sleep: `Encoding`.
    """

    def __init__(self, config: Config, world: World, encoding: Encoding) -> None:
        self.config = config
        self.world = world
        self.encoding = encoding
        self.digests: dict[PairImage, str] = {}  # of the data that `fill` was given
        self.size = config.data.image_size.height, config.data.image_size.width
        self.rejected = config.dpo.loss == "dpo"
        self._images: dict[View, PairImage] = {}

    @abstractmethod
    def assemble(self, pairs: list[PreferencePair], images: Encoded, drop: Tensor | None) -> EncodedPairs:
        """What the losses read, of encoded images (as many rows); where `drop` [B] bool is true, without the prompt."""

    def fill(self, datasets: Sequence[PreferenceDataset], console: Console, on_step: Callable[[], None]) -> None:
        """Encodes all images and prompts of `datasets` that the cache lacks; see `Encoding.fill`."""
        for dataset in datasets:
            self.digests |= dataset.image_digests()
        for dataset in datasets:
            dataset.expected |= self.digests
        pairs = [pair for dataset in datasets for pair in dataset.pairs]
        self._images = {self._view(image, pair): image for image, pair in self._images_of(pairs)}
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
        self.encoding.fill(dict.fromkeys(self._images, self._load), prompts, console, on_step)
        if self.encoding.keeps_pictures:
            for dataset in datasets:
                dataset.decodes = False

    def encode(self, batch: PreferenceBatch, drop: Tensor | None = None) -> EncodedPairs:
        """The batch as its losses read it, on the device; where `drop` [B] bool is true, without the prompt."""
        images = self._images_of(batch.pairs)
        if batch.images is not None:
            found = self.encoding.shown(None, batch.images.first(len(images)))
        else:
            found = self.encoding.shown([self._view(image, pair) for image, pair in images], None)
        return self.assemble(batch.pairs, found, drop)

    def size_of(self, pairs: Sequence[PreferencePair]) -> tuple[int, int]:
        """Height and width in pixels of the images of a batch of pairs."""
        return next((pair.size for pair in pairs if pair.size is not None), self.size)

    def _images_of(self, pairs: Sequence[PreferencePair]) -> list[tuple[PairImage, PreferencePair]]:
        """The rows of `pairs`: the preferred images, then the rejected ones where they are used, each with its pair."""
        return [(pair.preferred, pair) for pair in pairs] + [(pair.rejected, pair) for pair in pairs if self.rejected]

    def _view(self, image: PairImage, pair: PreferencePair) -> View:
        return View(self.digests[image], self.size_of([pair]))

    def _load(self, view: View) -> ImageRows:
        return stack_rows([load_cropped(self._images[view], *view.size, digest=view.digest)])
