"""The text a prompt asks to be drawn: everything in quotation marks, with apostrophes left alone."""

from __future__ import annotations

import re
import unicodedata

# Letters of scripts written with spaces: an apostrophe stands next to one, a quotation mark in Chinese text does not.
_LETTER = "A-Za-z0-9\u00c0-\u024f"
# 'tis, 'em, rock 'n' roll, the '90s: a mark that opens one of these opens no quotation.
_ELISION = r"(?:(?:[Tt]is|[Tt]was|em|til|cause)(?![A-Za-z'])|n'|\d0s(?!'))"

_SPANS = re.compile(
    rf"""
      (?<![0-9])"([^"]*)"                                             # a mark after a digit means inches: 12" pizza
    | \uff02([^\uff02]*)\uff02                                        # fullwidth double
    | [\u201c\u201e]([^\u201c\u201d\u201e]*)[\u201d\u201c]            # curly, and low-high
    | \u00ab([^\u00ab\u00bb]*)\u00bb                                  # guillemets
    | \u300c([^\u300c\u300d]*)\u300d                                  # CJK corner
    | \u300e([^\u300e\u300f]*)\u300f                                  # CJK white corner
    | \u2018((?:[^\u2018\u2019]|\u2019(?=[{_LETTER}]))+)\u2019        # curly single, in-word apostrophes inside
    | (?<![{_LETTER}])'(?!{_ELISION})(?=\S)
      ((?:[^']|(?<=[{_LETTER}])'(?=[{_LETTER}]))+)(?<=\S)'(?![{_LETTER}])   # straight single
    """,
    re.VERBOSE,
)


def quoted_text(prompt: str) -> list[str]:
    """Every quoted span of ``prompt``, in order, stripped; spans in which nothing is seen are left out.

    Double ("..."), curly (“...”, ‘...’), low („...“), guillemets («...»), fullwidth and CJK (「...」, 『...』) marks
    count; straight single marks count when they cannot be apostrophes. A quotation inside a quotation is part of the
    outer one.

    >>> quoted_text('the dogs\\' bowl says "WOOF" and it isn\\'t empty')
    ['WOOF']
    """
    spans = (next(group for group in match.groups() if group is not None) for match in _SPANS.finditer(prompt))
    return [span.strip() for span in spans if "".join(filter(is_seen, span)).strip()]


def is_seen(character: str) -> bool:
    """False for what has no picture: joiners, direction marks, soft hyphens, variation selectors."""
    variation = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return not (variation or character == "\u034f" or unicodedata.category(character) == "Cf")
