"""What is in the sets of captioned pictures, for a person to look at before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.data.captioned.samples import BadSample, Fault

MOST = 10_000
"""Pictures that are looked at; of more, so many evenly spaced ones."""

_AT_ONCE = 256


@dataclass(frozen=True)
class Seen:
    """A picture that can be trained on: its index, the file it is in and its name there, its own (height, width) and
    those that it has in a batch, its prompt, and the digest of its file's bytes."""

    index: int
    place: tuple[Path, str]
    shape: tuple[int, int]
    size: tuple[int, int]
    prompt: str
    digest: bytes

    @property
    def name(self) -> str:
        path, key = self.place
        return key or path.name

    @property
    def scale(self) -> float:
        """By which it is resized, so that it covers its size in a batch."""
        return max(self.size[0] / self.shape[0], self.size[1] / self.shape[1])

    @property
    def cut(self) -> float:
        """Share of the picture that is then cut off, in [0, 1)."""
        return 1 - self.size[0] * self.size[1] / (self.shape[0] * self.shape[1] * self.scale**2)


@dataclass
class Survey:
    """What was found. ``total``: samples of all sets, those at fault included; ``looked_at``: how many of those that
    can be read; ``broken`` and ``unsuitable`` ones cannot be trained on."""

    total: int
    looked_at: int = 0
    seen: list[Seen] = field(default_factory=list)
    broken: list[Fault] = field(default_factory=list)
    unsuitable: list[Fault] = field(default_factory=list)

    def copies(self) -> list[list[Seen]]:
        """Pictures with the same bytes, together."""
        by_digest: dict[bytes, list[Seen]] = {}
        for one in self.seen:
            by_digest.setdefault(one.digest, []).append(one)
        return [alike for alike in by_digest.values() if len(alike) > 1]

    def by_size(self) -> dict[tuple[int, int], list[Seen]]:
        """Pictures by the (height, width) that they have in a batch, the most frequent first."""
        found: dict[tuple[int, int], list[Seen]] = {}
        for one in self.seen:
            found.setdefault(one.size, []).append(one)
        return dict(sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def survey(
    pictures: CaptionedImages, *, threads: int = 0, most: int = MOST, tell: Callable[[int, int], None] | None = None
) -> Survey:
    """Reads and decodes the samples of `pictures`, which must let all of them be broken. `tell` is told how many of how
    many are done, now and then."""
    rows = _spread(len(pictures), most)
    known = [fault for one in pictures.sets for fault in one.faults]
    found = Survey(sum(map(len, pictures.sets)) + len(known), len(rows), broken=known)
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="survey") as pool:
        for start in range(0, len(rows), _AT_ONCE):
            for one in pool.map(lambda index: _seen(pictures, index), rows[start : start + _AT_ONCE]):
                if isinstance(one, Seen):
                    found.seen.append(one)
                else:
                    (found.unsuitable if one.unsuitable else found.broken).append(one.fault)
            if tell is not None:
                tell(min(start + _AT_ONCE, len(rows)), len(rows))
    return found


def _spread(count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else [place * count // most for place in range(most)]


def _seen(pictures: CaptionedImages, index: int) -> Seen | BadSample:
    try:
        found = pictures.look(index)
        size = pictures.size_of(index)
        digest = hashlib.sha256(pictures.read(index).image).digest()
    except BadSample as bad:
        return bad
    return Seen(index, pictures.where(index), (found.image.height, found.image.width), size, found.prompt, digest)


def words_of(prompts: Sequence[str]) -> Iterator[int]:
    """How many words each prompt has; of scripts without spaces, how many characters."""
    for prompt in prompts:
        yield sum(1 if word.isascii() else max(1, sum(map(_is_ideograph, word))) for word in prompt.split())


def _is_ideograph(character: str) -> bool:
    return "\u2e80" <= character <= "\u9fff" or "\uac00" <= character <= "\ud7af"
