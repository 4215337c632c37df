"""Read a dataset and decode all of it before training starts: every fault in one report, with path, line and remedy."""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from glm_training.data.examples import Example
from glm_training.data.json_records import read_json_lines, read_json_list
from glm_training.data.paths import PathRefused, local_path
from glm_training.data.pictures.buckets import Buckets, Size
from glm_training.data.pictures.images import decode_image
from glm_training.data.problems import DataError, Problem, format_problems
from glm_training.data.prompt_lengths import PromptReader, check_lengths
from glm_training.data.prompts_layout.layout import is_record, layout_of
from glm_training.data.prompts_layout.listing import Listing, Mode, Request, Role, Row, read_numbered
from glm_training.data.prompts_layout.metadata import EXAMPLE, metadata_in, read_metadata
from glm_training.data.text_lines import TextFile, read_text
from glm_training.utils.words import counted

logger = logging.getLogger(__name__)

_ROLES: tuple[Role, ...] = ("target", "source")
SIZE_MULTIPLE = 32
"""One large-grid token covers 32 x 32 pixels."""


@dataclass(frozen=True)
class ScanReport:
    """What a scan found.

    Attributes:
        examples: the usable examples, by index.
        quarantined: the faults of the examples that were left out; empty unless ``max_bad_fraction`` allows some.
        total: how many examples the dataset lists, usable or not.
        remarks: what is worth telling of the prompts, one line each.
    """

    examples: list[Example]
    quarantined: list[Problem]
    total: int
    remarks: list[str] = field(default_factory=list)


def load_examples(
    mode: Mode,
    prompts_file: str | Path,
    target_images_dir: str | Path | None = None,
    source_images_dir: str | Path | None = None,
    *,
    height: int,
    width: int,
    require_targets: bool = True,
    num_workers: int = 0,
    max_bad_fraction: float = 0.0,
) -> list[Example]:
    """The usable examples of :func:`scan_dataset`, which documents the arguments and errors."""
    report = scan_dataset(
        mode,
        prompts_file,
        target_images_dir,
        source_images_dir,
        height=height,
        width=width,
        require_targets=require_targets,
        num_workers=num_workers,
        max_bad_fraction=max_bad_fraction,
    )
    return report.examples


def scan_dataset(
    mode: Mode,
    prompts_file: str | Path,
    target_images_dir: str | Path | None = None,
    source_images_dir: str | Path | None = None,
    *,
    height: int,
    width: int,
    require_targets: bool = True,
    num_workers: int = 0,
    max_bad_fraction: float = 0.0,
    reader: PromptReader | None = None,
    buckets: Buckets | None = None,
) -> ScanReport:
    """Read the listing, decode every image and report.

    Args:
        mode: ``"i2i"`` gives every example a source image, ``"t2i"`` none.
        prompts_file: one prompt per line, JSON lines or one JSON list, told by the content; or the folder of a
            ``metadata.jsonl``.
        target_images_dir: the numbered target images; with JSON lines, the root of their target paths.
        source_images_dir: the same for the sources of ``i2i``; must be None for ``t2i``.
        height, width: pixels of the images in training, each a multiple of 32.
        require_targets: whether a dataset without targets is an error. Targets are all or none: when a target folder
            or a single target is given, every prompt needs one.
        num_workers: images decoded at the same time, in threads; 0 decodes in the caller's thread.
        max_bad_fraction: the part of the examples, in [0, 1], that may be at fault. Up to it they are logged and left
            out, their files untouched; above it, and for faults of the dataset as a whole, the scan fails.
        reader: says how much of each prompt the model reads; None leaves that open.
        buckets: give each example the size of its target's shape, or of its source's without a target, in which neither
            is enlarged; an example without a bucket is at fault. None: all have one size.

    Raises:
        DataError: with every problem found.
        ValueError: for arguments that no dataset could satisfy.
    """
    if mode not in ("t2i", "i2i"):
        raise ValueError(f"mode must be 't2i' or 'i2i', not {mode!r}")
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction must be between 0 and 1, not {max_bad_fraction}")
    request = Request(mode, prompts_file, target_images_dir, source_images_dir, require_targets)
    listing = _read_listing(request)
    listing.problems += _size_problems(listing.path, height, width)
    if source_images_dir is not None and not request.needs_source:
        remedy = "Train in mode i2i, or remove source_images_dir"
        reason = "source_images_dir is set but mode t2i starts from no image"
        listing.problems.append(Problem(Path(source_images_dir), reason, remedy))
    remarks: list[str] = []
    if reader is not None:
        prompts = [(row.index, row.line, row.prompt) for row in listing.rows if row.prompt is not None]
        problems, remarks = check_lengths(listing.path, prompts, reader)
        listing.problems += problems
    shapes: dict[Path, Size] = {}
    listing.problems += _decode_problems(listing, num_workers, shapes)
    sizes = {} if buckets is None else _sizes(listing, shapes, buckets)
    listing.problems.sort(key=lambda problem: -1 if problem.index is None else problem.index)
    report = _settle(listing, max_bad_fraction)
    examples = [replace(example, size=sizes.get(example.index)) for example in report.examples]
    return replace(report, examples=examples, remarks=remarks)


def _read_listing(request: Request) -> Listing:
    try:
        path = local_path(request.prompts_file)
    except PathRefused as refusal:
        at = Path(request.prompts_file)
        return Listing(at, problems=[Problem(at, f"prompts_file: {refusal.reason}", refusal.remedy)])
    if path.is_dir():
        found = metadata_in(path)
        if isinstance(found, Problem):
            return Listing(path, problems=[found])
        path = found
    file = read_text(path)
    if not file.lines:
        empty = Problem(path, "holds no prompt", "Write one prompt per line")
        return Listing(path, problems=file.problems or [empty])
    return _read_file(request, file)


def _read_file(request: Request, file: TextFile) -> Listing:
    """The listing of a file with lines, as its content says."""
    layout = layout_of(file)
    if isinstance(layout, Problem):
        return Listing(file.path, problems=[layout])
    if layout == "json list":
        return _read_list(request, file)
    if layout == "json lines":
        listing = read_metadata(request, file.path, read_json_lines(file.lines, EXAMPLE))
    else:
        listing = read_numbered(request, file.path, file.lines)
        for line in filter(is_record, file.lines):
            listing.add(line, "a JSON record among lines that are prompts", "Write its prompt alone on the line")
    listing.problems[:0] = file.problems
    return listing


def _read_list(request: Request, file: TextFile) -> Listing:
    """The listing of a JSON list of records, or of prompts alone, which go with numbered images."""
    records, problems = read_json_list(file)
    if not records:
        empty = Problem(file.path, "holds no prompt", EXAMPLE)
        return Listing(file.path, problems=problems or [empty])
    if not all(isinstance(record.value, str) for record in records):
        listing = read_metadata(request, file.path, records)
    else:
        listing = read_numbered(request, file.path, [record.line for record in records])
    listing.problems += problems
    return listing


def _size_problems(path: Path, height: int, width: int) -> Iterable[Problem]:
    for name, size in (("height", height), ("width", width)):
        if size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
            nearest = max(SIZE_MULTIPLE, round(size / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            reason = f"image_size.{name} is {size}, not a positive multiple of {SIZE_MULTIPLE}"
            yield Problem(path, reason, f"Set it to {nearest}")


def _sizes(listing: Listing, shapes: Mapping[Path, Size], buckets: Buckets) -> dict[int, Size]:
    """Index -> size of the examples that have images, all of them decoded; adds to the problems of the listing what has
    no bucket."""
    sizes: dict[int, Size] = {}
    for row in listing.rows:
        roles = [(role, path) for role in _ROLES if (path := row.images.get(role)) is not None]
        own = [shapes[path] for _, path in roles if path in shapes]
        if not own or len(own) < len(roles):
            continue
        size = buckets.size(*own)
        if size is not None:
            sizes[row.index] = size
            continue
        least = min(range(len(own)), key=lambda place: min(own[place]))
        (role, path), (reason, remedy) = roles[least], buckets.why_none(own[least])
        reason = f"{role} image {reason}"
        listing.problems.append(Problem(listing.path, reason, remedy, line=row.line, index=row.index, image=path))
    return sizes


def _decode_problems(listing: Listing, num_workers: int, shapes: dict[Path, Size]) -> Iterable[Problem]:
    """Decode each file once, and report its fault at every line that uses it; `shapes` gets (height, width) of the
    others."""
    paths = sorted({path for row in listing.rows for path in row.images.values()})
    faults: dict[Path, Problem] = {}
    for path, found in _map(_decoded_shape, paths, num_workers):
        if isinstance(found, Problem):
            faults[path] = found
        else:
            shapes[path] = found
    for row in listing.rows:
        for role, path in row.images.items():
            if path in faults:
                fault = faults[path]
                reason = f"{role} image {fault.reason}"
                yield replace(fault, path=listing.path, line=row.line, index=row.index, image=path, reason=reason)


def _decoded_shape(path: Path) -> tuple[Path, Problem | Size]:
    try:
        image = decode_image(path)
    except DataError as error:
        return path, error.problems[0]
    return path, (image.height, image.width)


def _map(
    function: Callable[[Path], tuple[Path, Problem | Size]], paths: list[Path], num_workers: int
) -> Iterable[tuple[Path, Problem | Size]]:
    if num_workers < 1:
        return [function(path) for path in paths]
    with ThreadPoolExecutor(num_workers, thread_name_prefix="scan") as pool:
        return list(pool.map(function, paths))


def _settle(listing: Listing, max_bad_fraction: float) -> ScanReport:
    """Raise, or leave out the examples at fault."""
    problems = listing.problems
    total = len(listing.rows)
    bad = {problem.index for problem in problems if problem.index is not None}
    examples = [_example(row) for row in listing.rows if row.index not in bad]
    curable = all(problem.index is not None for problem in problems)
    if problems and not (curable and examples and len(bad) <= max_bad_fraction * total):
        raise DataError(problems, _heading(listing.path, len(problems), len(bad), total, max_bad_fraction))
    if problems:
        heading = (
            f"{listing.path}: {len(bad)} of {counted(total, 'example')} left out of training, their files untouched:"
        )
        logger.warning("%s", format_problems(problems, heading))
    return ScanReport(examples, problems, total)


def _heading(path: Path, problems: int, bad: int, total: int, max_bad_fraction: float) -> str:
    count = counted(problems, "problem")
    heading = f"{path}: {count} in the data"
    if max_bad_fraction > 0.0:
        heading += f" ({bad} of {total} examples at fault, max_bad_fraction {max_bad_fraction:g})"
    return heading + ":"


def _example(row: Row) -> Example:
    if row.prompt is None:
        raise AssertionError(f"index {row.index} has no prompt and no problem that says so")
    return Example(row.index, row.prompt, row.images.get("target"), row.images.get("source"))
