"""Horizontal flips that are a pure function of (seed, epoch, index), and the prompts that forbid them."""

import re

from glm_training.utils.randomness import derive_seed

_QUOTED = re.compile(r"""["“”„«»「」『』]|'[^']+'|‘[^’]+’""")
_SIDED = re.compile(r"\b(?:left|right)|clockwise|左|右|顺时针|逆时针", re.IGNORECASE)


def may_flip(prompt: str) -> bool:
    """Whether a mirrored image still shows what ``prompt`` says.

    It does not when the prompt quotes text to be drawn (double quotes, paired single quotes, corner brackets,
    guillemets) or says left, right or clockwise, in English or Chinese; any word that begins with left or right counts.
    Text or sides that only the image shows cannot be known from here.
    """
    return _QUOTED.search(prompt) is None and _SIDED.search(prompt) is None


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """A fair coin for one example in one epoch, the same on every process and after every resume."""
    return derive_seed(seed, "horizontal flip", epoch, index) % 2 == 1
