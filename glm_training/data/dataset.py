"""Batches of prompts and images, decoded once when memory allows, ahead of time when threads are given."""

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from glm_training.data.examples import Batch, Example, ImageRows, View
from glm_training.data.fingerprint import combined_digest, example_digests, file_digests
from glm_training.data.pictures.images import CroppedImage, load_fitted, to_unit_range
from glm_training.utils.randomness import derive_seed

CACHE_BYTES = 512 * 2**20
_QUOTED = re.compile(r"""["“”„«»「」『』]|'[^']+'|‘[^’]+’""")
_SIDED = re.compile(r"\b(?:left|right)|clockwise|左|右|顺时针|逆时针", re.IGNORECASE)


class TrainingData(Protocol):
    """Items by position, in batches; ``remarks`` are what is worth telling of them, one line each."""

    remarks: list[str]

    def __len__(self) -> int: ...

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width in pixels that the pictures of the item at a position have in a batch."""
        ...

    def batch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> Any:
        """The items at positions ``indices``, of one size; ``epoch`` decides random crops and flips, one for all or one
        for each."""
        ...

    def prefetch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> None:
        """Start reading what a coming batch with the same arguments needs."""
        ...

    def example_digests(self) -> dict[str, str]:
        """Index -> SHA-256 of each item, for ``describe_drift``."""
        ...

    def close(self) -> None:
        """Stop what reads ahead."""
        ...


class _Wanted(NamedTuple):
    """An image file and the size it is to have."""

    path: Path
    height: int
    width: int


class ImageDataset:
    """Scanned examples as batches; :class:`T2IDataset` and :class:`I2IDataset` are the two kinds.

    Args:
        examples: from :func:`load_examples`; either all have a target or none has.
        height, width: pixels of every image in a batch, but of examples that have a ``size`` of their own.
        augmentation: mirror about half of the examples, target and source alike, as a pure function of (``seed``,
            epoch, ``Example.index``); never those that :func:`may_flip` rules out.
        seed: the run seed.
        num_workers: decoding threads; 0 decodes in the caller's thread and makes :meth:`prefetch` do nothing.
        pin_memory: page-lock the images for faster copies to a GPU; without CUDA it has no effect.
        cache_bytes: decoded images are kept in memory, as uint8, when all of them together fit in this; else none is.

    ``remarks``: what is worth telling of the data, one line each. ``decodes``: whether batches bring their pixels; a
    caller that has what encoders give of them switches it off.
    Raises ``ValueError`` when the examples do not suit. Use from one thread; :meth:`close` ends the threads.
    """

    has_sources: bool

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        height: int,
        width: int,
        augmentation: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not examples:
            raise ValueError("a dataset needs at least one example")
        _check_all_or_none("target", [example.target for example in examples], None)
        _check_all_or_none("source", [example.source for example in examples], self.has_sources)
        self.examples = tuple(examples)
        self.remarks: list[str] = []
        self.decodes = True
        self.height = height
        self.width = width
        self._augmentation = augmentation
        self._seed = seed
        self._num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._keeps_images = sum(3 * image.height * image.width for image in self._wanted(self.examples)) <= cache_bytes
        self._contents: dict[Path, str] = {}
        self._places: dict[str, Path] = {}
        self._images: dict[_Wanted, CroppedImage] = {}
        self._pending: dict[_Wanted, Future[CroppedImage]] = {}
        self._pool: ThreadPoolExecutor | None = None

    @property
    def has_targets(self) -> bool:
        """Whether batches carry target images."""
        return self.examples[0].target is not None

    def __len__(self) -> int:
        return len(self.examples)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of the images of an example in a batch."""
        return self._size(self._select([index])[0])

    def batch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> Batch:
        """The examples at positions ``indices``, each in [0, len(self)); repeats are allowed.

        Args:
            indices: at least one position, as :class:`StatefulSampler` draws them. Where a quarantine left gaps,
                position and ``Example.index`` differ.
            epoch: decides the flips; one for all, or one per position where a batch spans the end of an epoch.

        Raises:
            DataError: when a file that was scanned has gone or changed.
            IndexError, ValueError: for positions or epochs out of place, and for examples of several sizes.
        """
        examples = self._select(indices)
        check_one_size([self._size(example) for example in examples])
        epochs = [epoch] * len(examples) if isinstance(epoch, int) else list(epoch)
        if len(epochs) != len(examples):
            raise ValueError(f"{len(epochs)} epochs were given for {len(examples)} positions")
        flips = [self._is_flipped(example, count) for example, count in zip(examples, epochs, strict=True)]
        targets_shown, sources_shown = self._views(examples, flips)
        if not self.decodes:
            prompts = [example.prompt for example in examples]
            return Batch(list(indices), prompts, None, None, target_views=targets_shown, source_views=sources_shown)
        images = self._load(self._wanted(examples))
        size = self._size(examples[0])
        targets = [images[_Wanted(example.target, *size)] for example in examples if example.target is not None]
        sources = [images[_Wanted(example.source, *size)] for example in examples if example.source is not None]
        return Batch(
            indices=list(indices),
            prompts=[example.prompt for example in examples],
            targets=self._stack(targets, flips),
            sources=self._stack(sources, flips),
            original_sizes=torch.tensor([image.original_size for image in targets]) if targets else None,
            # at the centre: what a flip leaves on the left was cut off as wide on the right
            crops=torch.tensor([image.crop for image in targets]) if targets else None,
            target_views=targets_shown,
            source_views=sources_shown,
        )

    def prefetch(self, indices: Sequence[int], *, epoch: int | Sequence[int] = 0) -> None:
        """Start decoding the images of a coming :meth:`batch` in the background; earlier unused ones are let go."""
        if self._num_workers < 1 or not self.decodes:
            return
        wanted = self._wanted(self._select(indices))
        for image in [image for image in self._pending if image not in wanted]:
            self._pending.pop(image).cancel()
        for image in wanted:
            if image not in self._images:
                self._start(image)

    def example_digests(self) -> dict[str, str]:
        """Index -> SHA-256 per example, for :func:`describe_drift`; reads every file, at the first call."""
        return example_digests(self.examples, self._file_digests())

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all prompts and image files; moving or renaming the files does not change it."""
        return combined_digest(self.example_digests())

    def views(self, indices: Sequence[int] | None = None, *, targets: bool = True, sources: bool = True) -> list[View]:
        """Every picture, or those of the examples at `indices`, as any batch shows it, mirrored ones too; reads every
        file, if nobody has yet."""
        self._file_digests()
        found: dict[View, None] = {}
        for example in self._chosen(indices):
            for flipped in (False, True) if self._augmentation and may_flip(example.prompt) else (False,):
                of_target, of_source = self._views([example], [flipped])
                for wanted, views in ((targets, of_target), (sources, of_source)):
                    found |= dict.fromkeys(views or () if wanted else ())
        return list(found)

    def prompts(self, indices: Sequence[int] | None = None) -> list[str]:
        """The prompts of the examples, or of those at `indices`, each once."""
        return list(dict.fromkeys(example.prompt for example in self._chosen(indices)))

    def load(self, view: View) -> ImageRows:
        """One picture decoded, one row. Raises ``DataError`` when it is gone, or another by now."""
        image = load_fitted(self._places[view.digest], *view.size, digest=view.digest, mirrored=view.flipped)
        sizes, crops = torch.tensor([image.original_size]), torch.tensor([image.crop])
        return ImageRows(to_unit_range(image.pixels)[None], sizes, crops)

    def close(self) -> None:
        """Stop the decoding threads; a later batch starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _select(self, indices: Sequence[int]) -> list[Example]:
        if not indices:
            raise ValueError("a batch needs at least one position")
        for position in indices:
            if not 0 <= position < len(self.examples):
                raise IndexError(f"position {position} is outside a dataset of {len(self.examples)} examples")
        return [self.examples[position] for position in indices]

    def _chosen(self, indices: Sequence[int] | None) -> Sequence[Example]:
        return self.examples if indices is None else [self.examples[index] for index in indices]

    def _is_flipped(self, example: Example, epoch: int) -> bool:
        return self._augmentation and may_flip(example.prompt) and is_flipped(self._seed, epoch, example.index)

    def _size(self, example: Example) -> tuple[int, int]:
        return (self.height, self.width) if example.size is None else example.size

    def _wanted(self, examples: Sequence[Example]) -> list[_Wanted]:
        """The images of `examples`, each once."""
        every = (
            _Wanted(path, *self._size(example))
            for example in examples
            for path in (example.target, example.source)
            if path is not None
        )
        return list(dict.fromkeys(every))

    def _file_digests(self) -> dict[Path, str]:
        if not self._contents:
            self._contents = file_digests(self.examples)
            self._places = {digest: path for path, digest in self._contents.items()}
        return self._contents

    def _views(self, examples: list[Example], flips: list[bool]) -> tuple[list[View] | None, list[View] | None]:
        """Targets and sources as they are shown; None where there are none, or their content is not known yet."""
        found = []
        for paths in ([example.target for example in examples], [example.source for example in examples]):
            known = [
                View(self._contents[path], self._size(example), flipped)
                for example, path, flipped in zip(examples, paths, flips, strict=True)
                if path is not None and self._contents
            ]
            found.append(known or None)
        return found[0], found[1]

    def _start(self, image: _Wanted) -> None:
        if image in self._pending:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        self._pending[image] = self._pool.submit(load_fitted, *image)

    def _load(self, wanted: list[_Wanted]) -> dict[_Wanted, CroppedImage]:
        """Each image, from memory, from a prefetch, or decoded now."""
        images = {image: self._images[image] for image in wanted if image in self._images}
        missing = [image for image in wanted if image not in images]
        if self._num_workers > 0:
            for image in missing:
                self._start(image)
            futures = {image: self._pending.pop(image) for image in missing}
            decoded = {image: future.result() for image, future in futures.items()}
        else:
            decoded = {image: load_fitted(*image) for image in missing}
        if self._keeps_images:
            self._images.update(decoded)
        return images | decoded

    def _stack(self, images: list[CroppedImage], flips: list[bool]) -> Tensor | None:
        """float32 ``[B, 3, H, W]``, or None where the dataset has no such images."""
        if not images:
            return None
        rows = [
            image.pixels.flip(-1) if flipped else image.pixels for image, flipped in zip(images, flips, strict=True)
        ]
        batch = to_unit_range(torch.stack(rows))
        return batch.pin_memory() if self._pin_memory else batch


def sizes_of(data: TrainingData) -> list[tuple[int, int]]:
    """Height and width of every item's pictures in a batch."""
    return [data.size_of(index) for index in range(len(data))]


def check_one_size(sizes: Sequence[tuple[int, int]]) -> None:
    """Raises ``ValueError`` unless the items of a batch have one size."""
    if len(set(sizes)) > 1:
        raise ValueError(f"the items of a batch have one size, not {sorted(set(sizes))}")


def _check_all_or_none(role: str, paths: list[Path | None], expected: bool | None) -> None:
    """``expected`` True: every example has one, False: none has, None: either of the two."""
    given = sum(path is not None for path in paths)
    if expected is None:
        expected = given > 0
    if given != (len(paths) if expected else 0):
        wanted = "every example needs a" if expected else "no example may have a"
        raise ValueError(f"{wanted} {role} image, but {given} of {len(paths)} have one")


class T2IDataset(ImageDataset):
    """Batches of prompts with targets ``[B, 3, H, W]`` or None; ``sources`` is always None."""

    has_sources = False


class I2IDataset(ImageDataset):
    """Batches of prompts with sources ``[B, 3, H, W]``, and targets ``[B, 3, H, W]`` or None.

    Source and target are fitted alike and flipped together, so that pixels that match on disk match in the batch when
    both files have the same aspect ratio.
    """

    has_sources = True


def may_flip(prompt: str) -> bool:
    """Whether a mirrored image still shows what ``prompt`` says.

    It does not when the prompt quotes text to be drawn (double quotes, paired single quotes, corner brackets,
    guillemets) or says left, right or clockwise, in English or Chinese; any word that begins with left or right counts.
    Text or sides that only the image shows cannot be known from here.
    """
    return _QUOTED.search(prompt) is None and _SIDED.search(prompt) is None


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """A fair coin for one example in one epoch, the same on every process and after every resume."""
    return derive_seed(seed, "horizontal flip", epoch, index) % 2 == 1
