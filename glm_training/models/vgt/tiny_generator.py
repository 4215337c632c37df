"""A VGT generator of a few MB: the classes, files and code path of the real one, with a tokenizer made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config

from glm_training.models.vgt.generator import Generator, GeneratorConfig
from glm_training.models.vgt.prompt_text import IMAGE_START, TURN_END, TURN_START

_PAD = "<|endoftext|>"
TINY_WORDS = (
    "a an two three four red green blue yellow purple black circle square triangle circles squares triangles "
    'left of right of above below sign that says "CAFE" "OPEN" "STOP" "EXIT" "TAXI" "BANK" "HOTEL" "SALE" "FISH" '
    '"BOOK" "MILK" "ZOO" "PARK" "SHOP" "BUS" "GYM" "FARM" "JAZZ" "DUCK" "LION" "MOON" "PIZZA" "SOUP" "TEA"',
) * 2
"""The words of the small world of shapes and signs, for the tokenizer of `tiny`; twice, or no pair would be frequent
enough to be merged."""


def tiny_random_generator(*, seed: int = 0, **changes: Any) -> Generator:
    """Random fp32 weights that depend on `seed` alone, about 60 thousand: for tests. 4 channels on 4 x 4 places;
    `changes` to its `GeneratorConfig`."""
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {
        "llm": _llm(tokenizer, width=32, layers=2), "latent_channels": 4, "latent_norm": True,
        "grid": (4, 4), "query_grid": 8,        "head_width": 32, "head_depth": 2,
    }  # fmt: skip
    return Generator(GeneratorConfig(**(options | changes)), tokenizer, seed=seed).eval()


def tiny_generator(
    latent_channels: int,
    latent_norm: bool,
    grid: tuple[int, int],
    *,
    seed: int = 0,
    corpus: Sequence[str] = (),
    **changes: Any,
) -> Generator:
    """A generator that two CPU cores can train, with about two million random weights. Its tokenizer learns the words
    of `corpus`; `changes` to its `GeneratorConfig`."""
    tokenizer = tiny_tokenizer(corpus)
    options: dict[str, Any] = {
        "llm": _llm(tokenizer, width=128, layers=4), "latent_channels": latent_channels,
        "latent_norm": latent_norm, "grid": grid,
        "query_grid": max(grid), "head_width": 256, "head_depth": 3,
    }  # fmt: skip
    return Generator(GeneratorConfig(**(options | changes)), tokenizer, seed=seed).eval()


def tiny_tokenizer(corpus: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """Byte-level BPE with the marks of VGT's template, and the merges that `corpus` teaches, up to 512 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=TURN_END, padding_side="left",
        additional_special_tokens=[TURN_START, IMAGE_START],
    )  # fmt: skip


def _llm(tokenizer: PreTrainedTokenizerBase, *, width: int, layers: int) -> dict[str, Any]:
    """A Qwen2 with tied embeddings, as the language model of the published 0.6B."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=max(1, width // 32), max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, dtype="float32",
    )  # fmt: skip
    values: dict[str, Any] = config.to_dict()
    return values
