"""Preference pairs in a Hugging Face dataset on disk, in the shape of yuvalkirstain/pickapic_v2.

Either as ``save_to_disk`` writes it, or a folder of parquet files as ``hf download`` brings it from the hub, which the
first use turns into the library's own format in its cache (``HF_DATASETS_CACHE``): as much disk space once more.

Columns ``caption`` (text), ``jpg_0`` and ``jpg_1`` (encoded image bytes, or an Image feature), ``label_0``: 1 when the
first image is preferred, 0 when the second is, 0.5 for a tie. Rows stay on disk until their images are asked for.
"""

import importlib.util
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from glm_training.data.preference.dataset import PairImage
from glm_training.data.preference.listing import PairListing, add_pair, read_label, read_prompt
from glm_training.data.problems import DataError, Problem

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
_PARQUET = ("*.parquet", "*/*.parquet", "*/*/*.parquet")


class Table(Protocol):
    """The part of ``datasets.Dataset`` that is used."""

    @property
    def column_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any:
        """The column of a name, whose values are read by row or one after the other."""
        ...


@dataclass(frozen=True)
class TableImage:
    """An image in a row of a table. ``path`` is the table's folder."""

    path: Path
    row: int
    column: str
    table: Table = field(repr=False, compare=False)

    @property
    def place(self) -> str:
        return f"row {self.row}: "

    def read(self) -> bytes:
        value = self.table[self.column][self.row]  # one column: the other image stays on disk
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            reason = f"{self.place}column {self.column!r} holds no image bytes but {type(data).__name__}"
            raise DataError([Problem(self.path, reason, "Save the dataset with its images inside", index=self.row)])
        return data


def is_table(folder: Path) -> bool:
    """Whether ``folder`` was written by ``save_to_disk`` of Hugging Face datasets, or holds parquet files."""
    return _is_saved(folder) or bool(_parquet_splits(folder))


def open_table(folder: Path, split: str) -> Table:
    """The dataset in ``folder``, or its ``split``; raises ``DataError`` when it or the extra cannot be had."""
    if importlib.util.find_spec("datasets") is None:
        remedy = 'Install the extra: pip install "glm_training[datasets]"'
        raise DataError([Problem(folder, "is a Hugging Face dataset, and the package datasets is missing", remedy)])
    import datasets

    opened = _open_saved(folder, split) if _is_saved(folder) else _open_parquet(folder, split)
    opened = opened.with_format(None)  # plain values, whatever format it was saved with
    for name in ("jpg_0", "jpg_1"):
        if isinstance(opened.features.get(name), datasets.Image):
            opened = opened.cast_column(name, datasets.Image(decode=False))  # the bytes, decoded by our own rules
    return opened


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)


def _open_saved(folder: Path, split: str) -> Any:
    import datasets

    opened = _explained(folder, "Save it again with save_to_disk", lambda: datasets.load_from_disk(str(folder)))
    if isinstance(opened, datasets.DatasetDict):
        _require_split(folder, split, opened)
        opened = opened[split]
    return opened


def _open_parquet(folder: Path, split: str) -> Any:
    import datasets

    files = _parquet_splits(folder)
    _require_split(folder, split, files)
    wanted = {split: [str(path) for path in files[split]]}
    return _explained(
        folder,
        "Download its files again",
        lambda: datasets.load_dataset("parquet", data_files=wanted, split=split),
    )


def _parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, named as on the hub: train-00000-of-00002.parquet, train.parquet or train/0000.parquet."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(path for pattern in _PARQUET for path in folder.glob(pattern)):
        name = re.match(r"[A-Za-z]\w*", path.name)
        splits.setdefault(name.group() if name else path.parent.name, []).append(path)
    return splits


def _require_split(folder: Path, split: str, known: Collection[str]) -> None:
    if split not in known:
        raise DataError([Problem(folder, f"has no split {split!r} but {', '.join(known)}", "Name one of these splits")])


def _explained(folder: Path, remedy: str, load: Callable[[], Any]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())  # the library's own says only that it failed
        cause = cause if len(cause) <= 400 else f"{cause[:300]} ... {cause[-80:]}"
        reason = f"cannot be opened as a Hugging Face dataset: {cause}"
        raise DataError([Problem(folder, reason, remedy)]) from error


def read_table(folder: Path, table: Table) -> PairListing:
    """The pairs of ``table``, opened from ``folder``; images are not read."""
    listing = PairListing(folder, total=len(table))
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        reason = f"lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}"
        listing.problems.append(Problem(folder, reason, f"Rename its columns to {', '.join(COLUMNS)}"))
        return listing
    if not len(table):
        listing.problems.append(Problem(folder, "holds no pair", "Save a dataset with rows"))
    for index, (caption, label) in enumerate(zip(table["caption"], table["label_0"], strict=True)):
        before = len(listing.problems)
        prompt = read_prompt(listing, index, {"caption": caption}, "caption")
        order = read_label(listing, index, label)
        if len(listing.problems) > before or prompt is None:
            continue
        images: list[PairImage | None] = [TableImage(folder, index, name, table) for name in ("jpg_0", "jpg_1")]
        add_pair(listing, index, prompt, images, order)
    return listing
