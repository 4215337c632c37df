"""The glyph branch: what the DiT is told about the words to draw.

Only the quoted spans of a prompt reach the ByT5 text encoder; a prompt without quotes is encoded as "". The stock
pipeline's ways are kept exactly, because the released weights were used with them: apostrophes open spans too, and an
even number of spans prepends one attended pad token to each. What is not kept is its batching, which left-pads shorter
prompts with zero vectors that the DiT then attends to: here a batch carries a mask.

B prompts, G tokens of the longest, D width of the encoder.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

_SPANS = (
    re.compile(r"'([^']*)'"),
    re.compile("\u201c([^\u201c\u201d]*)\u201d"),
    re.compile(r'"([^"]*)"'),
    re.compile("\u300c([^\u300c\u300d]*)\u300d"),
)

MAX_SPAN_TOKENS = 2048
"""Bytes of one quoted span that are encoded, end mark included; the rest is cut (the stock pipeline's default)."""

MAX_GLYPH_TOKENS = 4 * MAX_SPAN_TOKENS
"""Of all spans of a prompt together. Beyond it, pages of quotes, the DiT's attention takes gigabytes."""


def glyph_texts(prompt: str) -> tuple[str, ...]:
    """The quoted spans of a prompt in the order the stock pipeline encodes them: '..', “..”, "..", 「..」.

    Each kind of quote is searched on its own, so two apostrophes ("it's Tom's") make a spurious span. A prompt without
    spans gives ``("",)``.
    """
    spans = tuple(span for pattern in _SPANS for span in pattern.findall(prompt))
    return spans or ("",)


def glyph_token_bound(spans: Sequence[str]) -> int:
    """At most how many tokens `encode_spans` gives: the bytes of each, cut, an end mark, and perhaps a pad."""
    return sum(min(len(span.encode("utf-8")) + 1, MAX_SPAN_TOKENS) + 1 for span in spans)


def encode_spans(
    spans: Sequence[str], text_encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Tensor:
    """Embeddings of one prompt's spans, concatenated: ``[G, D]`` in the text encoder's dtype, without gradient.

    Raises ValueError for more than `MAX_GLYPH_TOKENS`.
    """
    if glyph_token_bound(spans) > MAX_GLYPH_TOKENS:
        raise ValueError(f"{len(spans)} quoted texts come to over {MAX_GLYPH_TOKENS} tokens: quote less")
    rows = tokenizer(list(spans), max_length=MAX_SPAN_TOKENS, truncation=True).input_ids
    if len(rows) % 2 == 0:
        rows = [[tokenizer.pad_token_id, *row] for row in rows]
    # A cached embedding must not depend on who asked first: under autocast, or in inference mode.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return torch.cat([_encode_rows(some, text_encoder, tokenizer, device) for some in _at_once(rows)])


def _at_once(rows: list[list[int]]) -> list[list[list[int]]]:
    """`rows` in as few batches as hold `MAX_GLYPH_TOKENS` each, padding included: a page among a thousand words must
    not make a thousand pages."""
    batches: list[list[list[int]]] = [[]]
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if longest * (len(batches[-1]) + 1) > MAX_GLYPH_TOKENS:
            batches.append([])
            longest = len(row)
        batches[-1].append(row)
    return batches


def _encode_rows(
    rows: list[list[int]], text_encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Tensor:
    longest = max(len(row) for row in rows)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows], device=device)
    return text_encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()]


class GlyphCache:
    """Glyph embeddings per set of quoted spans. The text encoder is frozen, so each is computed once.

    Holds the `capacity` most recently used embeddings on the device that asks, and forgets all of them when that is
    another, and when the text encoder is replaced or has another dtype. `made`: who encodes in its place, `[G, D]` for
    spans.
    """

    def __init__(self, capacity: int = 512) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 embedding, got {capacity}")
        self.capacity = capacity
        self._entries: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._valid_for: tuple[int, torch.device, torch.dtype] | None = None
        self.made: Callable[[tuple[str, ...]], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything, for when the text encoder's weights were changed in place."""
        self._entries.clear()

    def embed(
        self,
        prompts: Sequence[str],
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Right-padded embeddings ``[B, G, D]`` of the prompts and a mask ``[B, G]``, True where a token is real, on
        `device`: where the text encoder is unless it is given, as a text encoder may be asleep elsewhere."""
        weight = text_encoder.get_input_embeddings().weight
        device = weight.device if device is None else device
        valid_for = (id(text_encoder), device, weight.dtype)
        if valid_for != self._valid_for:
            self.clear()
            self._valid_for = valid_for
        rows = [self._lookup(glyph_texts(prompt), text_encoder, tokenizer, device) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        glyph = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(glyph.shape[1], device=device) < lengths[:, None]
        return glyph, mask

    def _lookup(
        self,
        spans: tuple[str, ...],
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> Tensor:
        entry = self._entries.get(spans)
        if entry is None:
            own = text_encoder.get_input_embeddings().weight.device
            made = encode_spans(spans, text_encoder, tokenizer, own) if self.made is None else self.made(spans)
            entry = made.to(device)
            self._entries[spans] = entry
            if len(self._entries) > self.capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(spans)
        return entry
