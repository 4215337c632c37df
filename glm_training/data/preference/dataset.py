"""Preference pairs: one prompt, the image that was preferred and the one that was rejected.

Three layouts, told apart by what is there: JSON lines such as ``metadata.jsonl``, a JSON list such as
``human_feedback.json`` (the file, or its folder), and a Hugging Face dataset on disk in the shape of pickapic_v2 (extra
``datasets``).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image

from glm_training.data.dataset import check_one_size
from glm_training.data.examples import Example, ImageRows
from glm_training.data.pictures.images import CroppedImage, decode_image, to_unit_range
from glm_training.data.problems import DataError, Problem
from glm_training.utils.randomness import uniform

Crop = Literal["center", "random"]


class PairImage(Protocol):
    """Where an image of a pair lies. ``path`` and ``place`` (inside it, before a reason) name it in messages; ``read``
    gives its encoded bytes."""

    @property
    def path(self) -> Path: ...

    @property
    def place(self) -> str: ...

    def read(self) -> bytes:
        """The file's bytes; raises ``DataError`` when they are gone."""
        ...


@dataclass(frozen=True)
class FileImage:
    """An image in a file of its own, links resolved."""

    path: Path
    place: str = ""

    def read(self) -> bytes:
        try:
            if not self.path.is_file():  # opening a pipe would wait for ever
                reason = "is not a regular file" if self.path.exists() else "does not exist"
                raise DataError([Problem(self.path, reason, "Put the image there")])
            return self.path.read_bytes()
        except OSError as error:
            problem = Problem(self.path, f"cannot be read: {error.strerror}", "Correct the file's permissions")
            raise DataError([problem]) from error


@dataclass(frozen=True)
class PreferencePair:
    """One judgement.

    Attributes:
        index: zero-based row of the listing; ties and a quarantine leave gaps.
        prompt: the text, without surrounding white space.
        preferred: the better image.
        rejected: the other one.
        size: (height, width) in pixels of both in a batch; None where all pairs have one size.
    """

    index: int
    prompt: str
    preferred: PairImage
    rejected: PairImage
    size: tuple[int, int] | None = None


def image_digest(image: PairImage) -> str:
    """SHA-256 (hex) of the image's bytes: the content address under which its latents are kept."""
    return hashlib.sha256(image.read()).hexdigest()


def pair_digest(pair: PreferencePair, images: Mapping[PairImage, str]) -> str:
    """SHA-256 (hex) of the prompt and both images' digests: the content of a pair, wherever it lies."""
    digest = hashlib.sha256()
    for part in (pair.prompt, images[pair.preferred], images[pair.rejected]):
        data = part.encode("utf-8")
        digest.update(b"%d:%b" % (len(data), data))
    return digest.hexdigest()


def distinct_prompts(pairs: Sequence[PreferencePair], limit: int) -> list[Example]:
    """The first `limit` different prompts, without images: what samples of a run are drawn for, each at the size of its
    first pair."""
    sizes: dict[str, tuple[int, int] | None] = {}
    for pair in pairs:
        sizes.setdefault(pair.prompt, pair.size)
    first = list(sizes.items())[:limit]
    return [Example(index, prompt, None, None, size) for index, (prompt, size) in enumerate(first)]


@dataclass
class PreferenceBatch:
    """B pairs and the positions asked for. ``images``: 2 B rows, the preferred of every pair, then the rejected; None
    from a dataset that does not decode."""

    indices: list[int]
    pairs: list[PreferencePair]
    images: ImageRows | None

    @property
    def prompts(self) -> list[str]:
        return [pair.prompt for pair in self.pairs]


@dataclass(frozen=True)
class ResizedImage:
    """uint8 ``pixels [h, w, 3]``, which cover the size that was asked for, and the upright file's (height, width)."""

    pixels: np.ndarray
    original_size: tuple[int, int]


def load_resized(image: PairImage, height: int, width: int, digest: str | None = None) -> ResizedImage:
    """The image, decoded by the rules of :mod:`glm_training.data.pictures.images`, resized (Lanczos) to cover the size.

    Raises:
        DataError: when the image is gone, cannot be decoded or, with ``digest``, has another one by now.
        ValueError: unless both sides are at least 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image cannot be resized to height {height} x width {width}: both must be at least 1")
    data = image.read()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        reason = f"{image.place}changed since the start of the run"
        raise DataError([Problem(image.path, reason, "Put the old one back and resume, or start a new run")])
    decoded = decode_image(image.path, data)
    scale = max(height / decoded.height, width / decoded.width)
    covering = max(width, round(decoded.width * scale)), max(height, round(decoded.height * scale))
    pixels = np.asarray(decoded.resize(covering, Image.Resampling.LANCZOS))
    return ResizedImage(pixels, (decoded.height, decoded.width))


def cropped(image: ResizedImage, height: int, width: int, position: tuple[float, float] = (0.5, 0.5)) -> CroppedImage:
    """``height`` x ``width`` of the image. ``position``: which part of the overhang is cut off at the top and at the
    left, each in [0, 1]."""
    covering = image.pixels.shape
    top, left = (
        min(int(part * (overhang + 1)), overhang)
        for part, overhang in zip(position, (covering[0] - height, covering[1] - width), strict=True)
    )
    cut = np.array(image.pixels[top : top + height, left : left + width])
    return CroppedImage(torch.from_numpy(cut).permute(2, 0, 1).contiguous(), image.original_size, (top, left))


def load_cropped(
    image: PairImage,
    height: int,
    width: int,
    position: tuple[float, float] = (0.5, 0.5),
    *,
    digest: str | None = None,
) -> CroppedImage:
    """The image resized to cover ``height`` x ``width``, then cut; see :func:`load_resized` and :func:`cropped`."""
    return cropped(load_resized(image, height, width, digest), height, width, position)


def stack_rows(images: Iterable[CroppedImage]) -> ImageRows:
    """Images of one size as rows."""
    rows = list(images)
    return ImageRows(
        to_unit_range(torch.stack([image.pixels for image in rows])),
        torch.tensor([image.original_size for image in rows]),
        torch.tensor([image.crop for image in rows]),
    )


_Wanted = tuple[PairImage, int, int]
"""An image, and the height and width that it is to cover."""


class PreferenceDataset:
    """Pairs as batches.

    Args:
        pairs: from :func:`glm_training.data.preference.scan.load_pairs`.
        height, width: pixels of every image in a batch, but of pairs that have a ``size`` of their own.
        crop: ``center``, or ``random`` at a place that depends on (``seed``, epoch, ``PreferencePair.index``, which of
            the two) alone.
        seed: the run seed.
        num_workers: threads that read and decode; 0 does it in the caller's thread.
        pin_memory: page-lock the pixels for faster copies to a GPU; without CUDA it has no effect.

    ``decodes``: whether batches bring their pixels; a caller that has the images' latents switches it off.
    ``expected``: image -> the digest that its bytes must have when they are decoded; from the first
    :meth:`image_digests` on that of every image.
    ``held_out``: pairs to validate on. ``remarks``: what is worth telling of the pairs, one line each.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        *,
        height: int,
        width: int,
        crop: Crop = "center",
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not pairs:
            raise ValueError("a dataset needs at least one pair")
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', not {crop!r}")
        self.pairs = tuple(pairs)
        self.height = height
        self.width = width
        self.decodes = True
        self.expected: dict[PairImage, str] = {}
        self.held_out: PreferenceDataset | None = None
        self.remarks: list[str] = []
        self._crop = crop
        self._seed = seed
        self._num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._digests: dict[PairImage, str] = {}
        self._pending: dict[_Wanted, Future[ResizedImage]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of both images of a pair in a batch."""
        return self._size(self._select([index])[0])

    def first(self, count: int) -> "PreferenceDataset":
        """The first `count` pairs as a dataset of their own, decoded in the caller's thread."""
        own = PreferenceDataset(
            self.pairs[:count], height=self.height, width=self.width, crop=self._crop, seed=self._seed
        )
        own.decodes, own.expected, own._digests = self.decodes, self.expected, self._digests
        return own

    # -- content -------------------------------------------------------------------------------------------------------

    def image_digests(self) -> dict[PairImage, str]:
        """Every image of the pairs -> SHA-256 of its bytes; each is read once, at the first call."""
        if not self._digests:
            images = list(dict.fromkeys(image for pair in self.pairs for image in (pair.preferred, pair.rejected)))
            read = map(image_digest, images) if self._num_workers < 1 else self._threads().map(image_digest, images)
            self._digests = dict(zip(images, read, strict=True))
            self.expected |= self._digests
        return self._digests

    def example_digests(self) -> dict[str, str]:
        """Index (as text, for JSON) -> :func:`pair_digest`, for ``describe_drift``."""
        images = self.image_digests()
        return {str(pair.index): pair_digest(pair, images) for pair in self.pairs}

    # -- batches -------------------------------------------------------------------------------------------------------

    def batch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> PreferenceBatch:
        """The pairs at positions ``indices``, each in [0, len(self)); repeats are allowed.

        Args:
            indices: at least one position.
            epoch: decides random crops; one for all, or one per position where a batch spans the end of an epoch.

        Raises:
            DataError: when an image that was scanned has gone or changed.
            IndexError, ValueError: for positions or epochs out of place, and for pairs of several sizes.
        """
        pairs = self._select(indices)
        check_one_size([self._size(pair) for pair in pairs])
        epochs = [epoch] * len(pairs) if isinstance(epoch, int) else list(epoch)
        if len(epochs) != len(pairs):
            raise ValueError(f"{len(epochs)} epochs were given for {len(pairs)} positions")
        return PreferenceBatch(list(indices), pairs, self._rows(pairs, epochs) if self.decodes else None)

    def prefetch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> None:
        """Start decoding the images of a coming :meth:`batch` in the background; earlier unused ones are let go."""
        if not self.decodes or self._num_workers < 1:
            return
        pairs = self._select(indices)
        wanted = {(image, *self._size(pair)) for pair in pairs for image in (pair.preferred, pair.rejected)}
        for image in [image for image in self._pending if image not in wanted]:
            self._pending.pop(image).cancel()
        for image in wanted:
            self._start(image)

    def close(self) -> None:
        """Stop the threads; a later batch starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._pending.clear()

    def _select(self, indices: Sequence[int]) -> list[PreferencePair]:
        if not indices:
            raise ValueError("a batch needs at least one position")
        for position in indices:
            if not 0 <= position < len(self.pairs):
                raise IndexError(f"position {position} is outside a dataset of {len(self.pairs)} pairs")
        return [self.pairs[position] for position in indices]

    def _rows(self, pairs: list[PreferencePair], epochs: list[int]) -> ImageRows:
        """The preferred images, then the rejected ones."""
        images = [pair.preferred for pair in pairs] + [pair.rejected for pair in pairs]
        positions = [place for which in (0, 1) for place in self._positions(pairs, epochs, which)]
        size = self._size(pairs[0])
        rows = stack_rows(
            cropped(image, *size, position)
            for image, position in zip(self._resized(images, size), positions, strict=True)
        )
        if self._pin_memory:
            rows.pixels = rows.pixels.pin_memory()
        return rows

    def _positions(self, pairs: list[PreferencePair], epochs: list[int], which: int) -> list[tuple[float, float]]:
        if self._crop == "center":
            return [(0.5, 0.5)] * len(pairs)
        names = [(epoch, pair.index, which) for pair, epoch in zip(pairs, epochs, strict=True)]
        draws = uniform(self._seed, "preference crop", names, (2,))
        return [(float(top), float(left)) for top, left in draws]

    def _size(self, pair: PreferencePair) -> tuple[int, int]:
        return (self.height, self.width) if pair.size is None else pair.size

    def _resized(self, images: Sequence[PairImage], size: tuple[int, int]) -> list[ResizedImage]:
        if self._num_workers < 1:
            return [load_resized(image, *size, self.expected.get(image)) for image in images]
        wanted = [(image, *size) for image in images]
        for image in wanted:
            self._start(image)
        done = {image: self._pending.pop(image).result() for image in dict.fromkeys(wanted)}
        return [done[image] for image in wanted]

    def _start(self, wanted: _Wanted) -> None:
        if wanted not in self._pending:
            digest = self.expected.get(wanted[0])
            self._pending[wanted] = self._threads().submit(load_resized, *wanted, digest)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        return self._pool
