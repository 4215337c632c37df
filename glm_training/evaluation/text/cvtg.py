"""CVTG-2K's scoring rules (Du et al., 2025, arXiv:2503.23461, appendix C): words that were asked for against words that
were read, all in lower case."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from glm_training.rewards.text_accuracy import prefix_distances

CLIP_PREFIX = "A photo depicts "
CLIP_SCALE = 2.5

_QUOTED = re.compile(r"'(.*?)'")
_EPSILON = 1e-5


def quoted_words(prompt: str) -> list[str]:
    """Every word in single quotes, in order.

    Their rule, kept for figures that compare: a quote ends at the next mark, so that an apostrophe inside or between
    quotations would end or begin one. Their prompts have none; `glm_training.rewards.quoted_text` is for those that do.

    >>> quoted_words("a sign 'Fresh  Milk' and a flag '2 go'")
    ['fresh', 'milk', '2', 'go']
    """
    return [word for span in _QUOTED.findall(prompt) for word in span.lower().split()]


def read_words(lines: Sequence[str]) -> list[str]:
    """The words of what a reader found."""
    return [word for line in lines for word in line.lower().split()]


def words_found(wanted: Sequence[str], read: Sequence[str]) -> list[bool]:
    """For each word that was asked for, whether it was read exactly. One reading serves words that are asked for twice,
    and what was read besides costs nothing: that is their rule."""
    there = set(read)
    return [word in there for word in wanted]


def similarities(wanted: Sequence[str], read: Sequence[str]) -> list[float]:
    """For each word that was asked for, 1 - d / (n + 1e-5) against the reading that difflib finds nearest, with d the
    Levenshtein distance and n the longer length; 0 where nothing was read. They call the mean NED; 1 is best."""
    return [_similarity(word, difflib.get_close_matches(word, read, n=1, cutoff=0)) for word in wanted]


def _similarity(word: str, nearest: Sequence[str]) -> float:
    if not nearest:
        return 0.0
    return 1 - prefix_distances(word, nearest[0])[-1] / (max(len(word), len(nearest[0])) + _EPSILON)


def clip_score(cosine: float) -> float:
    """2.5 max(cos, 0), of the picture and `CLIP_PREFIX` + prompt (Hessel et al., 2021, arXiv:2104.08718)."""
    return CLIP_SCALE * max(cosine, 0.0)
