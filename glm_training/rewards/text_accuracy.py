"""Text accuracy: does the image show the text that the prompt quotes?"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from glm_training.rewards.ocr import load_reader, read_lines, read_texts
from glm_training.rewards.ocr_models import DEFAULT_LANGUAGE, languages_for, recogniser_of
from glm_training.rewards.options import TextAccuracyOptions
from glm_training.rewards.quoted_text import is_seen, quoted_text
from glm_training.rewards.types import MetricScores, RewardBackendError, RewardBatch, RewardSampleError
from glm_training.utils.hub_files import Wanted

_SHOWN = 10
"""How many prompts a message names."""

_PLAIN_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
)


def normalise(text: str) -> list[str]:
    """Words of ``text`` in one case and one width (NFKC, casefold), curly marks and long dashes made plain, without
    what nobody sees (joiners, direction marks, soft hyphens, variation selectors)."""
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS).casefold()
    # casefold may take letters apart that NFKC writes as one
    return "".join(filter(is_seen, unicodedata.normalize("NFKC", plain))).split()


@lru_cache(maxsize=4)
def _readable(characters: frozenset[str]) -> frozenset[str]:
    """What `characters` come to in a text that is compared."""
    return frozenset(letter for character in characters for word in normalise(character) for letter in word)


def unreadable(prompt: str, characters: frozenset[str] | None) -> str:
    """The characters of the prompt's quoted text, each once, that an engine which reads `characters` has not; none
    where `characters` is None, of an engine that does not tell."""
    if characters is None:
        return ""
    known = _readable(characters)
    wanted = (letter for span in quoted_text(prompt) for word in normalise(span) for letter in word)
    return "".join(dict.fromkeys(letter for letter in wanted if letter not in known))


def prefix_distances(wanted: str, read: str) -> list[int]:
    """Levenshtein distance from ``wanted`` to every prefix of ``read``: len(read) + 1 numbers, the first len(wanted).

    Bit-parallel (Myers 1999, Hyyro 2003): one column of the table per character of ``read``, in a few integer steps.
    """
    size = len(wanted)
    if size == 0:
        return list(range(len(read) + 1))
    mask, last = (1 << size) - 1, 1 << (size - 1)
    positions: dict[str, int] = {}
    for index, char in enumerate(wanted):
        positions[char] = positions.get(char, 0) | 1 << index
    up, down = mask, 0
    distances = [size]
    for char in read:
        match = positions.get(char, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        rise = down | ~(diagonal | up) & mask
        fall = up & diagonal
        distances.append(distances[-1] + bool(rise & last) - bool(fall & last))
        rise = (rise << 1 | 1) & mask
        fall = fall << 1 & mask
        up = fall | ~(diagonal | rise) & mask
        down = rise & diagonal
    return distances


@dataclass(frozen=True)
class _Match:
    similarity: float
    start: int
    stop: int


def _best_run(span: str, words: Sequence[str | None]) -> _Match:
    """The run of consecutive words (None = already used) nearest to ``span``, spaces ignored; empty when none is."""
    best = _Match(0.0, 0, 0)
    for start in range(len(words)):
        run: list[str] = []
        for word in words[start:]:
            if word is None or sum(map(len, run)) >= 2 * len(span):
                break
            run.append(word)
        distances = prefix_distances(span, "".join(run))
        length = 0
        for count, word in enumerate(run, start=1):
            length += len(word)
            similarity = 1 - min(distances[length], len(span)) / len(span)
            if similarity > best.similarity:
                best = _Match(similarity, start, start + count)
    return best


def score_lines(spans: Sequence[str], lines: Sequence[str], extra_text_penalty: float) -> float:
    """How well the ``lines`` read from an image show the quoted ``spans``, in [0, 1].

    Per span t: 1 - min(Levenshtein, |t|) / |t| against its best run of consecutive words, within a line or over
    adjacent ones; longer spans choose first and no word serves twice. The score is the mean over spans, minus
    ``extra_text_penalty`` x (characters no span used) / (characters wanted), clamped. Case, spaces and width do not
    matter.
    """
    wanted = sorted(filter(None, ("".join(normalise(span)) for span in spans)), key=len, reverse=True)
    words: list[str | None] = [word for line in lines for word in normalise(line)]
    similarity = 0.0
    for span in wanted:
        match = _best_run(span, words)
        similarity += match.similarity / len(wanted)
        words[match.start : match.stop] = [None] * (match.stop - match.start)
    extra = sum(len(word) for word in words if word is not None)
    return min(1.0, max(0.0, similarity - extra_text_penalty * extra / sum(map(len, wanted))))


def word_score(spans: Sequence[str], lines: Sequence[str]) -> float:
    """Share of the quoted words that stand in ``lines`` exactly, as often as quoted, in [0, 1]. A span whose spaces
    alone were read differently counts in full. Case and width are ignored."""
    words: list[str | None] = [word for line in lines for word in normalise(line)]
    partly: list[list[str]] = []
    right = 0
    for quoted in sorted((normalise(span) for span in spans), key=len, reverse=True):
        match = _best_run("".join(quoted), words)
        if match.similarity == 1:
            right += len(quoted)
            words[match.start : match.stop] = [None] * (match.stop - match.start)
        else:
            partly.append(quoted)
    wanted = Counter(word for quoted in partly for word in quoted)
    right += (wanted & Counter(word for word in words if word is not None)).total()
    return right / sum(len(normalise(span)) for span in spans)


def word_accuracy(
    images: torch.Tensor, prompts: Sequence[str], options: TextAccuracyOptions | None = None
) -> torch.Tensor:
    """[B] fp32 share of each prompt's quoted words that its image shows exactly; NaN where the prompt quotes nothing.

    images: [B, 3, H, W] float in [0, 1]. Raises RewardBackendError and RewardSampleError as ``read_texts`` does, and
    RewardSampleError for quoted text that the engine cannot read.
    """
    characters = load_reader(options or TextAccuracyOptions()).characters
    for row, prompt in enumerate(prompts):
        if missing := unreadable(prompt, characters):
            raise RewardSampleError(f"prompt {row}: {_cannot_read(missing)}")
    spans = [quoted_text(prompt) for prompt in prompts]
    rows = [row for row, quoted in enumerate(spans) if quoted]
    scores = torch.full((len(spans),), math.nan)
    for row, lines in zip(rows, read_texts(images[rows], options), strict=True):
        scores[row] = word_score(spans[row], lines)
    return scores


class TextAccuracy:
    """OCR accuracy of the quoted text, in [0, 1] (see ``score_lines``). Applies to prompts that quote text; with
    ``only_readable`` not to those whose text holds characters that the engine has not, which cannot be scored."""

    needs = "text in quotation marks in the prompt"

    def __init__(self, options: TextAccuracyOptions, *, only_readable: bool = False) -> None:
        self._options = options
        self.only_readable = only_readable

    def unreadable(self, prompt: str) -> str:
        """The characters of the prompt's quoted text that the engine has not, each once."""
        return unreadable(prompt, load_reader(self._options).characters)

    def unreadable_prompts(self, prompts: Sequence[str], places: Sequence[str]) -> str | None:
        """The prompts whose quoted text the OCR engine cannot read, and what to do; None without any."""
        missing = {row: characters for row, prompt in enumerate(prompts) if (characters := self.unreadable(prompt))}
        if not missing:
            return None
        texts = {row: f"{prompts[row][:40]!r}: {' '.join(characters[:20])}" for row, characters in missing.items()}
        named = ", ".join(f"{places[row]} ({text})" for row, text in list(texts.items())[:_SHOWN])
        more = f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        languages = languages_for("".join(missing.values()))
        which = f", here {', '.join(languages)}," if languages else ""
        outcome = "text_accuracy is left out there, as reward.on_error: skip says"
        if not self.only_readable:
            outcome = (
                "however well such text is drawn, it would not count as right (reward.on_error: skip leaves "
                "text_accuracy out there)"
            )
        return (
            f"text_accuracy cannot read characters that {len(missing)} of {len(prompts)} prompts quote: {named}{more}. "
            f"Add the languages that have them{which} to reward.options.text_accuracy.languages, or take such text out "
            f"of the quotation marks; {outcome}"
        )

    def wanted(self) -> list[Wanted]:
        """The recognisers of the languages that RapidOCR has, where no file of one is given."""
        options = self._options
        if options.engine != "rapidocr" or find_spec("rapidocr") is None:
            return []
        given = {language for language, _ in options.model_files}
        found: list[Wanted] = []
        for language in options.languages:
            if language not in given and language != DEFAULT_LANGUAGE:
                with suppress(RewardBackendError):  # `check` tells of a language that there is not
                    found.append(recogniser_of(language))
        return found

    def check(self) -> None:
        """Raises RewardBackendError when the OCR engine is missing."""
        load_reader(self._options)

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """True when the prompt quotes text."""
        return bool(quoted_text(prompt)) and not (self.only_readable and self.unreadable(prompt))

    def score(self, batch: RewardBatch) -> MetricScores:
        """One score per sample; a failed reading is a failure, never a score."""
        scores = MetricScores(torch.zeros(len(batch)))
        for row, lines in enumerate(read_lines(batch.images, load_reader(self._options))):
            if missing := self.unreadable(batch.prompts[row]):
                scores.failures[row] = _cannot_read(missing)
            elif isinstance(lines, RewardSampleError):
                scores.failures[row] = str(lines)
            else:
                spans = quoted_text(batch.prompts[row])
                scores.values[row] = score_lines(spans, lines, self._options.extra_text_penalty)
        return scores


def _cannot_read(missing: str) -> str:
    return f"the OCR engine has no {' '.join(missing)} (reward.options.text_accuracy.languages)"
