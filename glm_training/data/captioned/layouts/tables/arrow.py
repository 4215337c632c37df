"""A Hugging Face dataset: as `save_to_disk` writes it, as parquet files, or by its id on the hub (extra `datasets`).

Parquet files are turned into the library's own format in its cache (`HF_DATASETS_CACHE`) on first use. Pictures are
bytes in the table, or paths that start at its folder, or at `root`. Rows stay on disk until they are asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm_training.data.captioned.layouts.tables.columns import Columns, ColumnsMissing, columns_of
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import (
    HASHED_CAPTIONS,
    BadSample,
    CaptionFault,
    Encoded,
    Fault,
    bounds,
    checked_caption,
    read_below,
)
from glm_training.data.paths import PathRefused, local_path
from glm_training.data.problems import DataError, Problem

NAME = "a Hugging Face dataset with columns of pictures and captions, on disk or by its id on the hub"
MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote."""

DEFAULT_SPLIT = "train"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def may_be_hub_id(path: Path) -> bool:
    """Whether a path of the configuration, at which nothing lies, may be meant as a dataset's id."""
    return _HUB_ID.fullmatch(path.as_posix()) is not None


def open_set(options: SetOptions, reading: Reading, files: Sequence[Path]) -> ArrowSet:
    """The rows of the parquet `files`; of the saved dataset in the folder, or of the dataset on the hub, without any.
    Raises DataError."""
    path = options.path
    if importlib.util.find_spec("datasets") is None:
        extra = 'pip install "glm_training[datasets]"'
        told = "is a Hugging Face dataset, and the package datasets is missing", f"Install the extra: {extra}"
        if not path.exists():
            remedy = f"Correct the path; datasets of the Hugging Face Hub need an extra: {extra}"
            told = "there is no such file or folder", remedy
        raise DataError([Problem(path, *told)])
    import datasets

    if files:
        table = _parquet(options, files)
    elif path.exists():
        loaded = _explained(path, "Save it again with save_to_disk", lambda: datasets.load_from_disk(str(path)))
        table = _split_of(options, loaded) if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        table = _from_hub(options, reading)
    try:
        names = columns_of(table.column_names, options.cap_source, captions=reading.captions, sources=reading.sources)
    except ColumnsMissing as missing:
        raise DataError([Problem(path, str(missing), missing.remedy)]) from missing
    if not len(table):
        raise DataError([Problem(path, "holds no row", f"Give {NAME}")])
    return ArrowSet(options, reading, table, names, files)


def _parquet(options: SetOptions, files: Sequence[Path]) -> Any:
    """The rows of the split's files, named as on the hub: train-00000-of-00002.parquet, train/0000.parquet; of all
    files where one split alone, or none, can be told."""
    import datasets

    splits: dict[str, list[str]] = {}
    for file in files:
        name = re.match(r"(train|test|validation|valid|val|dev)(?=[-_.]|\Z)", file.stem)
        below = file.parent.name if file.parent != options.path else ""
        splits.setdefault(name[1] if name else below, []).append(str(file))
    wanted = _split_of(options, splits)
    return _explained(
        options.path,
        "Make the files again",
        lambda: datasets.load_dataset("parquet", data_files={"train": wanted}, split="train"),
    )


def _split_of(options: SetOptions, splits: Any) -> Any:
    """The split that is asked for, else `train`, else the only one."""
    name = DEFAULT_SPLIT if options.split is None else options.split
    if name not in splits and (options.split is not None or len(splits) > 1):
        raise DataError([Problem(options.path, f"has no split {name!r} but {', '.join(splits)}", "Set split to one")])
    return splits[name] if name in splits else next(iter(splits.values()))


def _from_hub(options: SetOptions, reading: Reading) -> Any:
    import datasets

    name, split = options.path.as_posix(), options.split or DEFAULT_SPLIT
    remedy = (
        f"Correct it; or on a connected machine: hf download --repo-type dataset {name} --local-dir FOLDER, and give "
        "the folder"
    )
    download = datasets.DownloadConfig(local_files_only=reading.local_files_only)
    return _explained(
        options.path,
        remedy,
        lambda: datasets.load_dataset(name, split=split, download_config=download),
        "there is no such file or folder, nor could it be had from the Hugging Face Hub",
    )


def _explained(path: Path, remedy: str, load: Callable[[], Any], what: str = "cannot be opened") -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        cause = cause if len(cause) <= 400 else f"{cause[:300]} ... {cause[-80:]}"
        raise DataError([Problem(path, f"{what}: {cause}", remedy)]) from error


class ArrowSet:
    """See :class:`ImageSet`."""

    layout = NAME

    def __init__(
        self, options: SetOptions, reading: Reading, table: Any, columns: Columns, files: Sequence[Path]
    ) -> None:
        import datasets

        self.name = str(options.path)
        self.faults: list[Fault] = []
        self.remarks: list[str] = []
        self._options, self._columns = options, columns
        self._path, self._optional = options.path, reading.optional
        folder = options.path if options.path.is_dir() or not files else files[0].parent
        self._root = folder if options.root is None else options.root
        self._real_root = bounds(self._root)
        self._caption = columns.caption if reading.captions else None
        self._source = columns.source if reading.sources else None
        wanted = [name for name in (columns.image, self._caption, self._source) if name is not None]
        table = table.with_format(None).select_columns(list(dict.fromkeys(wanted)))
        for name in (columns.image, columns.source):
            if name in table.column_names and isinstance(table.features[name], datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))  # decoded by our own rules
        labels = None if self._caption is None else table.features[self._caption]
        self._labels = labels.names if isinstance(labels, datasets.ClassLabel) else None
        self._table = table
        self._digest = self._digested(files)
        if self._caption is not None and columns.others:
            also = ", ".join(columns.others)
            self.remarks.append(f"{self.name}: captions are of the column {self._caption}; cap_source may name {also}")
        if columns.source is not None and not reading.sources:
            self.remarks.append(f"{self.name}: the pictures of the column {columns.source} are for training.mode i2i")

    def _digested(self, files: Sequence[Path]) -> str:
        """Of the columns, the number of rows, the sizes of files and, of a small set, the captions."""
        local = list(files)
        if not local and self._path.is_dir():
            local = sorted(path for path in self._path.rglob("*.arrow"))
        digest = hashlib.sha256(f"{self._columns!r} {len(self._table)}\n".encode())
        for path in local:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if self._caption is not None and len(self._table) <= HASHED_CAPTIONS:
            for caption in self._table[self._caption]:
                digest.update(f"{caption!r}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._table)

    def read(self, row: int) -> Encoded:
        values = self._table[row]
        image = self._bytes(row, self._columns.image, values)
        source = None if self._source is None else self._bytes(row, self._source, values)
        if self._caption is None:
            return Encoded(image, None, source)
        text = values[self._caption]
        text = text[0] if isinstance(text, list) and text else text
        if self._labels is not None and isinstance(text, int) and text >= 0:  # -1 is none
            text = self._labels[text]
        if not isinstance(text, str):
            raise self._bad(row, f"{self._caption!r} is no text but {type(text).__name__}", "Set cap_source")
        try:
            return Encoded(image, checked_caption(text, row, optional=self._optional), source)
        except CaptionFault as fault:
            raise self._bad(row, fault.reason, fault.remedy) from fault

    def _bytes(self, row: int, column: str, values: dict[str, Any]) -> bytes:
        """The encoded picture of a cell: bytes, or a file that it names."""
        value = values[column]
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes) and data:
            return data
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str) or not path:
            raise self._bad(row, f"{column!r} holds no picture but {type(data).__name__}", "Save it with its pictures")
        try:
            return read_below(self._real_root, self._root / local_path(path))
        except PathRefused as refusal:
            raise self._bad(row, refusal.reason, refusal.remedy) from refusal
        except BadSample as bad:
            raise self._bad(row, f"{bad.fault.path} {bad.fault.reason}", bad.fault.remedy) from bad

    def _bad(self, row: int, reason: str, remedy: str) -> BadSample:
        return BadSample(Fault(*self.where(row), reason, remedy))

    def part(self, row: int, offset: int, size: int) -> bytes:
        return self.read(row).image[offset : offset + size]

    def where(self, row: int) -> tuple[Path, str]:
        return self._path, f"row {row}"

    def digests(self) -> dict[str, str]:
        return {self.name: self._digest}

    def close(self) -> None:
        """The table stays mapped into memory."""
