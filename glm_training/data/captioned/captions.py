"""What is made of captions as the data has them: a trigger word before them, and some left out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from glm_training.utils.randomness import uniform


@dataclass(frozen=True)
class Captioning:
    """How captions become prompts.

    Attributes:
        trigger_word: goes before each caption that does not hold it, and is the caption of a picture without one.
        dropout: share of what is drawn whose prompt is empty, in [0, 1].
    """

    trigger_word: str | None = None
    dropout: float = 0.0

    def prompt(self, caption: str | None) -> str:
        """The caption with the trigger word. It is held as a word of its own, in the same case: `sks` is not in
        `asks`, and `TOK` is not `tok` to a tokenizer."""
        if self.trigger_word is None or re.search(rf"(?<!\w){re.escape(self.trigger_word)}(?!\w)", caption or "", re.A):
            return caption or ""
        return f"{self.trigger_word}, {caption}" if caption else self.trigger_word

    def is_dropped(self, seed: int, epoch: int, index: int) -> bool:
        """Whether the sample drawn at `index` in an epoch has an empty prompt: the same on every process, and after
        every resume."""
        return self.dropout > 0 and uniform(seed, "caption dropout", [(epoch, index)], (1,)).item() < self.dropout
