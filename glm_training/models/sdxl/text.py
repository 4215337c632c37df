"""Prompts to what the UNet reads of them: both CLIP text encoders, each with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerBase

from glm_training.models.loading import load_errors_explained, parts_at_hand
from glm_training.models.prompt_reading import PromptReading, read_by_encoders
from glm_training.models.sdxl.tiny import tiny_tokenizers
from glm_training.models.sdxl.types import SDXLText


@dataclass(frozen=True)
class PromptReader:
    """Both tokenizers: each cuts a prompt at its own length, as the stock pipeline does."""

    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]

    parts: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    """Folders of a pipeline that it is made from."""

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> PromptReader | None:
        """Of "tiny-random", a pipeline folder or a hub id in the local cache; None where its files are not here. Raises
        ModelLoadError for files that cannot be read."""
        if name == "tiny-random":
            return PromptReader(tiny_tokenizers())
        folder = parts_at_hand(name, cls.parts, revision)
        if folder is None:
            return None
        with load_errors_explained(f"the tokenizers in {folder}"):
            first, second = (CLIPTokenizer.from_pretrained(str(folder / part)) for part in cls.parts)
        return PromptReader((first, second))

    def read(self, prompts: Sequence[str], height: int, width: int, mode: str) -> list[PromptReading]:
        """One reading per prompt, the same for images of any size."""
        return read_by_encoders(prompts, self.tokenizers)


def encode_prompts(
    prompts: Sequence[str],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
) -> SDXLText:
    """The B prompts as the stock pipeline encodes them, in the encoders' dtype and on their device, without gradient.

    Padded and cut to each tokenizer's length (77), second-to-last hidden states of both encoders, pooled of the second.
    An empty prompt is encoded like any other. Autocast is off inside: what is cached must not depend on who asked.
    Raises ValueError for a single string or no prompts.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts must be a non-empty list of strings, got {prompts!r}")
    hidden = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        device = next(encoder.parameters()).device
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            output = encoder(ids.to(device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return SDXLText(torch.cat(hidden, dim=-1), output.text_embeds)
