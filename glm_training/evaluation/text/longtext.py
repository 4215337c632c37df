"""LongText-Bench's scoring rule (Geng et al., 2025, X-Omni, arXiv:2507.22058): how much of the text that was asked for
was read, as a multiset: of words in English, of characters in Chinese."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Language = Literal["en", "zh"]

_LETTERS = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_NEITHER_LETTER_NOR_SPACE = re.compile(rf"[^{_LETTERS}\s]")
_NO_LETTER = re.compile(rf"[^{_LETTERS}]")


def units(text: str, language: Language) -> list[str]:
    """What is counted: words in lower case, or characters as they are; marks are left out of both.

    >>> units("It's  5 PM!", "en"), units("它 5 PM！", "zh")
    (['its', '5', 'pm'], ['它', '5', 'P', 'M'])
    """
    if language == "en":
        return _NEITHER_LETTER_NOR_SPACE.sub("", text).lower().split()
    return list(_NO_LETTER.sub("", text))


def matched(wanted: Sequence[str], lines: Sequence[str], language: Language) -> tuple[int, int]:
    """How many units of the texts that were asked for stand in what was read, as often as asked for, and of how many.
    The benchmark's figure is the sum of the first over all pictures, over the sum of the second."""
    asked = Counter(units(" ".join(wanted), language))
    return (asked & Counter(units("\n".join(lines), language))).total(), asked.total()
