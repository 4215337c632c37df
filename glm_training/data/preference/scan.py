"""Read preference pairs and decode all their images before training starts: every fault in one report."""

import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from glm_training.data.paths import PathRefused, local_path
from glm_training.data.pictures.buckets import Buckets, Size
from glm_training.data.pictures.images import decode_image
from glm_training.data.preference.dataset import FileImage, PairImage, PreferencePair
from glm_training.data.preference.listing import PairListing, read_listing
from glm_training.data.preference.table import is_table, open_table, read_table
from glm_training.data.problems import DataError, Problem, format_problems
from glm_training.data.prompt_lengths import PromptReader, check_lengths
from glm_training.data.prompts_layout.metadata import METADATA_NAME
from glm_training.data.text_lines import read_text
from glm_training.utils.words import counted

logger = logging.getLogger(__name__)

FEEDBACK_NAME = "human_feedback.json"
UNLIKE = 1.25
"""Times that one image of a pair is longer for its width than the other, from where on that is told."""


@dataclass(frozen=True)
class PreferenceReport:
    """What a scan found.

    Attributes:
        pairs: the usable pairs, by index.
        ties: how many rows were dropped because neither image was preferred.
        quarantined: the faults of the pairs that were left out; empty unless ``max_bad_fraction`` allows some.
        total: how many rows the dataset lists, ties and faults included.
        remarks: what is worth telling of the prompts, one line each.
    """

    pairs: list[PreferencePair]
    ties: int
    quarantined: list[Problem]
    total: int
    remarks: list[str] = field(default_factory=list)


def load_pairs(
    path: str | Path,
    *,
    split: str = "train",
    check_images: bool = True,
    max_bad_fraction: float = 0.0,
    num_workers: int = 0,
    reader: PromptReader | None = None,
    buckets: Buckets | None = None,
) -> PreferenceReport:
    """Read the pairs at ``path`` and decode every image.

    Args:
        path: a file of JSON lines or with one JSON list, told by its content; a folder with ``metadata.jsonl`` or
            ``human_feedback.json``; or a Hugging Face dataset on disk (``save_to_disk``, or parquet files). Images of
            the first two lie below the listing's folder.
        split: which part of a Hugging Face dataset that has several.
        check_images: whether to decode all images first; False for a table too large for it.
        max_bad_fraction: the part of the rows, in [0, 1], that may be at fault. Up to it they are logged and left out,
            their files untouched; above it, and for faults of the dataset as a whole, the scan fails.
        num_workers: images decoded at the same time, in threads; 0 decodes in the caller's thread.
        reader: says how much of each prompt the model reads; None leaves that open.
        buckets: give each pair the size of its preferred image's shape, in which neither image is enlarged; a pair
            without a bucket is at fault. Needs ``check_images``. None: all have one size.

    Raises:
        DataError: with every problem found, each with file, line and remedy; also when only ties are left.
        ValueError: for a ``max_bad_fraction`` outside [0, 1].
    """
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction must be between 0 and 1, not {max_bad_fraction}")
    listing = _read_listing(path, split)
    remarks: list[str] = []
    if reader is not None:
        prompts = [(pair.index, listing.lines.get(pair.index), pair.prompt) for pair in listing.pairs]
        problems, remarks = check_lengths(listing.path, prompts, reader)
        listing.problems += problems
    shapes: dict[PairImage, Size] = {}
    if check_images:
        listing.problems += _decode_problems(listing, num_workers, shapes)
    if buckets is not None:
        listing.pairs = [_sized(listing, pair, shapes, buckets) for pair in listing.pairs]
        remarks += _unlike(listing, shapes)
    listing.problems.sort(key=lambda problem: -1 if problem.index is None else problem.index)
    return replace(_settle(listing, max_bad_fraction), remarks=remarks)


def _read_listing(value: str | Path, split: str) -> PairListing:
    try:
        path = local_path(value)
    except PathRefused as refusal:
        raise DataError([Problem(Path(value), refusal.reason, refusal.remedy)]) from refusal
    if path.is_dir():
        found = [path / name for name in (METADATA_NAME, FEEDBACK_NAME) if (path / name).is_file()]
        if not found and is_table(path):
            return read_table(path, open_table(path, split))
        if len(found) != 1:
            reason = (
                f"holds {'both' if found else 'neither'} {METADATA_NAME} {'and' if found else 'nor'} {FEEDBACK_NAME}"
            )
            raise DataError([Problem(path, reason, "Name the file to read" if found else "Add one of them")])
        path = found[0]
    if path.exists():
        return read_listing(read_text(path))
    reason = f"does not exist; the current directory is {Path.cwd()}"
    remedy = f"Name a folder with {METADATA_NAME}, a .jsonl or .json file, or a Hugging Face dataset folder"
    if not path.parent.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(value)):
        reason += ", and data sets are not downloaded by a run"
        remedy = (
            f'Save it once: python -c "from datasets import load_dataset; '
            f"load_dataset('{value}', split='{split}').save_to_disk('data/{path.name}')\", and name data/{path.name}"
        )
    raise DataError([Problem(path, reason, remedy)])


def _sized(
    listing: PairListing, pair: PreferencePair, shapes: Mapping[PairImage, Size], buckets: Buckets
) -> PreferencePair:
    """The pair with its size; adds to the problems of the listing where it has none."""
    images = (pair.preferred, pair.rejected)
    if not all(image in shapes for image in images):
        return pair  # it is at fault already
    size = buckets.size(*(shapes[image] for image in images))
    if size is None:
        least = min(images, key=lambda image: min(shapes[image]))
        role = "preferred" if least is pair.preferred else "rejected"
        reason, remedy = buckets.why_none(shapes[least])
        line, file = listing.lines.get(pair.index), least.path if isinstance(least, FileImage) else None
        reason = f"{role} image {reason}"
        listing.problems.append(Problem(listing.path, reason, remedy, line=line, index=pair.index, image=file))
    return replace(pair, size=size)


def _unlike(listing: PairListing, shapes: Mapping[PairImage, Size]) -> list[str]:
    """A remark on pairs whose images are cut alike though their shapes differ much."""
    found = []
    for pair in listing.pairs:
        if pair.size is not None:
            (h, w), (height, width) = shapes[pair.preferred], shapes[pair.rejected]
            if max(h * width, height * w) > UNLIKE * min(h * width, height * w):
                found.append(f"row {pair.index}: {w} x {h} and {width} x {height}")
    if not found:
        return []
    pairs = f"{counted(len(found), 'pair')} of {listing.path}"
    return [f"{pairs} with images of different shapes ({'; '.join(found[:3])}): cut to that of the preferred one"]


def _decode_problems(listing: PairListing, num_workers: int, shapes: dict[PairImage, Size]) -> Iterator[Problem]:
    """Decode each image once, and report its fault at every row that uses it; `shapes` gets (height, width) of the
    others."""
    images = list(dict.fromkeys(image for pair in listing.pairs for image in (pair.preferred, pair.rejected)))
    if num_workers < 1:
        found = [_decoded_shape(image) for image in images]
    else:
        with ThreadPoolExecutor(num_workers, thread_name_prefix="scan") as pool:
            found = list(pool.map(_decoded_shape, images))
    known = dict(zip(images, found, strict=True))
    shapes |= {image: shape for image, shape in known.items() if not isinstance(shape, Problem)}
    for pair in listing.pairs:
        for role, image in (("preferred", pair.preferred), ("rejected", pair.rejected)):
            fault = known[image]
            if not isinstance(fault, Problem):
                continue
            line = listing.lines.get(pair.index)
            file = image.path if isinstance(image, FileImage) else None
            reason = f"{role} image {fault.reason}"
            yield replace(fault, path=listing.path, line=line, index=pair.index, image=file, reason=reason)


def _decoded_shape(image: PairImage) -> Problem | Size:
    try:
        decoded = decode_image(image.path, image.read())
    except DataError as error:
        return error.problems[0]
    return decoded.height, decoded.width


def _settle(listing: PairListing, max_bad_fraction: float) -> PreferenceReport:
    """Raise, or leave out the pairs at fault."""
    problems, total = listing.problems, listing.total
    bad = {problem.index for problem in problems if problem.index is not None}
    pairs = [pair for pair in listing.pairs if pair.index not in bad]
    if not problems and not pairs:
        reason = "all its pairs are ties"
        problems = [Problem(listing.path, reason, "Training needs pairs in which one image is preferred")]
    curable = all(problem.index is not None for problem in problems)
    if problems and not (curable and pairs and len(bad) <= max_bad_fraction * total):
        count = counted(len(problems), "problem")
        raise DataError(problems, f"{listing.path}: {count} in the data:")
    if problems:
        heading = f"{listing.path}: {len(bad)} of {counted(total, 'pair')} left out of training, their files untouched:"
        logger.warning("%s", format_problems(problems, heading))
    if listing.ties:
        logger.info("%s: %d of %d pairs are ties and were dropped", listing.path, listing.ties, total)
    return PreferenceReport(pairs, listing.ties, problems, total)
