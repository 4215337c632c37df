"""What each model family makes of preference pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.data.preference.dataset import PreferencePair
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.encoding.batches import sdxl_text
from glm_training.engine.encoding.encoder import Encoded
from glm_training.models.family import Family
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.types import SDXLText, UNetCondition, add_time_ids
from glm_training.preference.encoded_pairs import EncodedPairs, PairEncoder
from glm_training.utils.distributed import World


class SDXLPairs(PairEncoder):
    """Latents and micro-conditioning of each image, both text encoders' view of a prompt.

    A prompt that is dropped is what guidance leads away from in sampling: zeros, or the empty prompt of a model that
    takes that.
    """

    def __init__(self, config: Config, family: SDXL, world: World, encoding: Encoding) -> None:
        super().__init__(config, world, encoding)
        self.unet = family.unet

    def assemble(self, pairs: list[PreferencePair], images: Encoded, drop: Tensor | None) -> EncodedPairs:
        device, prompts = self.world.device, [pair.prompt for pair in pairs]
        dropped = [False] * len(pairs) if drop is None else drop.tolist()
        text = sdxl_text(self.encoding, self.unet, prompts, dropped, device)
        ids = add_time_ids(images["original_sizes"], images["crops"], self.size_of(pairs), rows=len(images["crops"]))
        if self.rejected:
            text = SDXLText.cat([text, text])
        return EncodedPairs(pairs, images["latents"].to(device), UNetCondition(text, ids.to(device)))


class GLMPairs(PairEncoder):
    """Each image's own tokens, which the AR half is to write and the DiT half draws under, and its latents.

    A prompt that is dropped leaves the DiT half without tokens and quoted words, as in sampling; the AR half, which has
    no guidance, reads every prompt.
    """

    def __init__(self, config: Config, family: GLMImage, world: World, encoding: Encoding) -> None:
        super().__init__(config, world, encoding)
        self.family = family
        self.trains_ar, self.trains_dit = ("ar" in config.parts(), "dit" in config.parts())

    def assemble(self, pairs: list[PreferencePair], images: Encoded, drop: Tensor | None) -> EncodedPairs:
        device, prompts, size = self.world.device, [pair.prompt for pair in pairs], self.size_of(pairs)
        grid = self.family.ar.grids(*size, "t2i")[-1]
        encoded, tokens = EncodedPairs(pairs), images["tokens"].to(device)
        copies = 2 if self.rejected else 1
        if self.trains_dit:
            encoded.clean = images["latents"].to(device)
            condition = self.family.dit.condition(prompts * copies, tokens[:, -grid[0] * grid[1] :], grid)
            if drop is not None and bool(drop.any()):
                condition = self.family.dit.drop_condition(condition, drop.repeat(copies))
            encoded.condition = condition
        if self.trains_ar:
            encoded.tokens = tokens
            rows = torch.arange(len(pairs), device=device).repeat(copies)
            encoded.prompt = self.family.ar.encode_prompts(prompts, *size).select(rows)
        return encoded


PAIRS: dict[str, Callable[..., PairEncoder]] = {"glm_image": GLMPairs, "sdxl": SDXLPairs}
"""By `model.family`: what makes of pairs what its losses read."""


def build_pairs(config: Config, family: Family, world: World, encoding: Encoding) -> PairEncoder:
    """The encoder of the family."""
    return PAIRS[config.model.family](config, family, world, encoding)
