"""What a model reads of a prompt, told by its tokenizers alone: before any weights are loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

MAX_CHARACTERS = 100_000
"""Of a prompt that is tokenized at all, which takes about a second. No model reads as much."""


@dataclass(frozen=True)
class PromptReading:
    """fault: why the model cannot take the prompt, and the remedy. cut: what of it the model does not read, in words.
    read: stands for what it does read: prompts that share it are one to the model; None where it reads them whole."""

    fault: tuple[str, str] | None = None
    cut: str | None = None
    read: Hashable = None


SHORTEN = "Shorten the prompt"


def too_long(prompt: str) -> PromptReading | None:
    """The reading of a prompt that is not even tokenized; None for any other."""
    if len(prompt) <= MAX_CHARACTERS:
        return None
    return PromptReading((f"the prompt has {len(prompt)} characters, and at most {MAX_CHARACTERS} are read", SHORTEN))


def shortened(prompt: str, length: int = 80) -> str:
    """The beginning of `prompt`, to name it in a message."""
    return prompt if len(prompt) <= length else f"{prompt[:length]}..."


def excerpt(text: str, length: int = 40) -> str:
    """The end of `text`, on one line, to show where reading stops."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"...{line[-length:]}"


def token_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, marks: bool) -> list[list[int]]:
    """Ids of each prompt, none cut off, with the tokenizer's start and end `marks` or without; none at all for one that
    is `too_long`."""
    ids: list[list[int]] = []
    for start in range(0, len(prompts), 256):
        texts = ["" if too_long(prompt) else prompt for prompt in prompts[start : start + 256]]
        ids += tokenizer(texts, add_special_tokens=marks, verbose=False).input_ids
    return ids


def read_by_encoders(prompts: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> list[PromptReading]:
    """Of prompts that text encoders read up to their tokenizers' `model_max_length`, marks included, and no further.

    The reading says where, at the tokenizer that stops first.
    """
    every = [token_ids(prompts, tokenizer, marks=True) for tokenizer in tokenizers]
    readings = []
    for prompt, rows in zip(prompts, zip(*every, strict=True), strict=True):
        cuts = [_cut(prompt, ids, tokenizer) for ids, tokenizer in zip(rows, tokenizers, strict=True)]
        stops = [(stop, told) for stop, told in cuts if told]
        reading = too_long(prompt) or PromptReading()
        if stops:
            read = tuple(
                tuple(ids[: tokenizer.model_max_length - 1]) for ids, tokenizer in zip(rows, tokenizers, strict=True)
            )
            reading = PromptReading(cut=min(stops)[1], read=read)
        readings.append(reading)
    return readings


def _cut(prompt: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The character where `tokenizer` stops reading, and that in words; empty where it reads all."""
    limit = tokenizer.model_max_length
    if len(ids) <= limit:
        return len(prompt), ""
    offsets = tokenizer(prompt, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    stop = offsets[limit - 2][1]  # the last place is the end mark's
    return stop, f"{len(ids)} tokens, of which {limit} are read, up to {excerpt(prompt[:stop])!r}"
