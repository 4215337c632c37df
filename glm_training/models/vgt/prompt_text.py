"""How VGT's generator is told what to draw: a chat turn around the caption, then the token that begins an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from glm_training.models.prompt_reading import MAX_CHARACTERS, PromptReading, excerpt
from glm_training.models.vgt.sequence import Prompts

TURN_START, TURN_END, IMAGE_START = "<|im_start|>", "<|im_end|>", "<img>"

CONDITIONAL = "user\nGenerate an image: {prompt}"
UNCONDITIONAL = "user\nGenerate an image."
"""What takes the caption's place where there is none: in training without a caption, and for guidance."""

MAX_TEXT_TOKENS = 256
"""Of the turn, the image's token not counted. A longer caption is cut at its end, and the turn still closed."""


class PromptText:
    """Writes the template with the marks as ids: a caption that spells one of them is text like any other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError where the tokenizer lacks one of the marks."""
        vocabulary = tokenizer.get_vocab()
        missing = [mark for mark in (TURN_START, TURN_END, IMAGE_START) if mark not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer has no token {', '.join(missing)}: VGT needs that of InternVL3's language model, or "
                "one with these tokens added"
            )
        self.tokenizer = tokenizer
        start, end, image = (vocabulary[mark] for mark in (TURN_START, TURN_END, IMAGE_START))
        self._before = [start]
        self._after = [end, *self._ids("\n"), start, *self._ids("assistant\n")]
        self._image = [image]
        self._pad_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._room = MAX_TEXT_TOKENS - len(self._before) - len(self._after)

    def encode(self, prompts: Sequence[str], device: torch.device | str | None = None) -> Prompts:
        """Left-padded; an empty prompt is the unconditional text. Raises ValueError for none, or for a bare string."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a non-empty list of strings, got {prompts!r}")
        rows = [self._before + self._ids(_turn(p))[: self._room] + self._after + self._image for p in prompts]
        return Prompts.of(rows, self._pad_id, device)

    def read(self, prompts: Sequence[str]) -> list[PromptReading]:
        """How much of each prompt `encode` takes."""
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: str) -> PromptReading:
        turn = _turn(prompt)
        encoded = self._encoded(turn, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        if len(ids) <= self._room and len(prompt) <= MAX_CHARACTERS:
            return PromptReading()
        kept = turn[: encoded["offset_mapping"][: self._room][-1][1]]
        told = f"more than {self._room} tokens, which is all that is read: up to {excerpt(kept)!r}"
        return PromptReading(cut=told, read=tuple(ids[: self._room]))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encoded(text)["input_ids"]
        return ids

    def _encoded(self, text: str, **options: bool) -> Any:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def _turn(prompt: str) -> str:
    # characters past the limit would take seconds to tokenize, only to be cut off
    return CONDITIONAL.format(prompt=prompt[:MAX_CHARACTERS]) if prompt.strip() else UNCONDITIONAL
