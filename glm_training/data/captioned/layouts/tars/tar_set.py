"""webdataset tars, one or a folder of them: ImageNet style (picture and cls), or with captions (picture and txt, or
json).

In memory a sample is 8 bytes without captions and 17 with them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm_training.data.captioned.layouts.tars.index import IndexCache, TarIndex, sample_key, sample_name
from glm_training.data.captioned.layouts.tars.members import BLOCK, name_at
from glm_training.data.captioned.layouts.tars.open_files import OpenFiles
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import (
    DEFAULT_KEY,
    BadSample,
    CaptionFault,
    Encoded,
    Fault,
    caption_of_json,
    caption_of_text,
)
from glm_training.data.captioned.sniff import files_below, kind_of
from glm_training.data.problems import DataError, Problem
from glm_training.utils.words import counted

NAME = "tars of pictures, each with its caption (KEY.jpg and KEY.txt, or KEY.json) or its class (KEY.cls)"
_CAPTIONLESS = "has no caption", "Add it as .txt or in .json, set data.trigger_word"
_UNEDITED = "has no picture to edit", "Add it as KEY.source.jpg"
_REPAIR = "Make the tar again"


def open_set(options: SetOptions, reading: Reading) -> TarSet:
    """The samples of the tar, or of the tars below the folder. Raises DataError with all that no quarantine cures."""
    root = options.path
    paths, faults, remarks = ([root], [], []) if root.is_file() else _tars_below(root)
    usable: list[TarIndex] = []
    first = reading.rank * len(paths) // reading.world_size
    indexes = IndexCache(reading.index_dir).load(paths, threads=reading.threads, first=first, tell=reading.tell)
    for path, index in zip(paths, indexes, strict=True):
        if isinstance(index, OSError):
            faults.append(Fault(path, "", f"cannot be read: {index.strerror}", "Correct the file or its permissions"))
            continue
        faults += [Fault(path, what, reason, _REPAIR) for what, reason in index.faults]
        usable.append(index)
    found = TarSet(options, usable, reading, faults=faults, remarks=remarks)
    if len(found) == 0:
        raise DataError([_nothing(options, usable, found)])
    return found


def _tars_below(root: Path) -> tuple[list[Path], list[Fault], list[str]]:
    """The tars; what is named as one and is none; and how many other files there are."""
    paths, faults, others = [], [], []
    for path in files_below(root):
        kind = kind_of(path)
        if kind == "image":
            reason = f"is a picture among tars, as is no sample of {root}"
            raise DataError([Problem(path, reason, "Give the pictures as a set of their own, in another folder")])
        if kind == "tar":
            paths.append(path)
        elif path.suffix == ".tar" or ".tar." in path.name:
            remedy = "Unpack it: a compressed tar has no places to read from" if "compressed" in kind else _REPAIR
            faults.append(Fault(path, "", "is empty" if kind == "empty" else f"is no tar ({kind})", remedy))
        else:
            others.append(path.name)
    told = f"{root}: {counted(len(others), 'file')} beside the tars not read ({', '.join(others[:3])})"
    return paths, faults, [told] if others else []


def _nothing(options: SetOptions, indexes: Sequence[TarIndex], found: TarSet) -> Problem:
    """Why none of the tars has a sample that can be used."""
    rows, faults = found.pictures, found.faults
    if rows and found.unedited:
        return Problem(
            options.path, f"none of {counted(rows, 'picture')} has one to edit (KEY.source.jpg)", "Train in mode t2i"
        )
    members = [name for index in indexes for name in index.first][:5]
    shown = f"; its first members are {', '.join(members)}" if members else ""
    if rows:
        return Problem(
            options.path,
            f"none of {counted(rows, 'picture')} has a caption (a .txt or .json of its name){shown}",
            "Such tars, as ImageNet's, train an autoencoder; a generator needs captions",
        )
    first = f" ({faults[0].key + ' ' if faults[0].key else ''}{faults[0].reason})" if faults else ""
    return Problem(options.path, f"holds no sample{first}{shown}", f"The nearest layout: {NAME}")


class TarSet:
    """See :class:`ImageSet`. ``pictures``: how many there are, with and without captions; ``unedited``: whether
    sources are asked for, and none has any."""

    layout = NAME

    def __init__(
        self, options: SetOptions, indexes: list[TarIndex], reading: Reading, *, faults: list[Fault], remarks: list[str]
    ) -> None:
        self.name = str(options.path)
        self.faults = faults
        self.remarks = remarks
        self._options = options
        self._captions = captions = reading.captions
        self._optional, self._sources = reading.optional, reading.sources
        self._paths = [index.path for index in indexes]
        self._stamps = [index.stamp for index in indexes]
        self._repeated = [index.repeated for index in indexes]
        self._digests = {str(index.path): index.digest for index in indexes}
        self._files = OpenFiles()
        told = [(index.rows["text"] > 0) | (index.rows["json"] > 0) for index in indexes]
        edits = any((index.rows["source"] > 0).any() for index in indexes)
        speaks = any(rows.any() for rows in told)  # else that is told of the set as a whole
        self.pictures = sum(map(len, told))
        self.unedited = reading.sources and not edits
        parts: list[np.ndarray] = []
        for tar, (index, has_caption) in enumerate(zip(indexes, told, strict=True)):
            rows = index.rows
            if captions and not reading.optional:
                self.faults += self._silent(tar, rows["image"][~has_caption], *_CAPTIONLESS) if speaks else []
                rows = rows[has_caption]
            if reading.sources:
                self.faults += self._silent(tar, rows["image"][rows["source"] == 0], *_UNEDITED) if edits else []
                rows = rows[rows["source"] > 0]
            parts.append(self._columns(rows, captions))
            index.rows = np.empty(0, dtype=rows.dtype)  # of millions, the memory of one copy is enough
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self._rows = np.concatenate(parts) if parts else np.empty(0, dtype=[("image", "<u4")])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Encoded:
        tar = bisect_right(self._ends, row)
        at = self._rows[row]
        try:
            with self._files.reading(self._paths[tar], self._stamps[tar]) as file:
                image = file.at(int(at["image"]) * BLOCK, int(at["image_size"]))
                source = file.at(int(at["source"]) * BLOCK, int(at["source_size"])) if self._sources else None
                if not self._captions:
                    return Encoded(image, None, source)
                if self._optional and at["caption_size"] == 0:
                    return Encoded(image, "", source)
                caption = file.at(int(at["caption"]) * BLOCK, int(at["caption_size"]))
        except OSError as error:
            raise self._bad(row, f"cannot be read: {error.strerror}", "Look at the disk") from error
        try:
            if at["json"]:
                key = self._options.cap_source or DEFAULT_KEY
                return Encoded(image, caption_of_json(caption, key, row, optional=self._optional), source)
            return Encoded(image, caption_of_text(caption, row, optional=self._optional), source)
        except CaptionFault as fault:
            raise self._bad(row, fault.reason, fault.remedy) from fault

    def part(self, row: int, offset: int, size: int) -> bytes:
        tar, at = bisect_right(self._ends, row), self._rows[row]
        left = max(int(at["image_size"]) - offset, 0)
        try:
            with self._files.reading(self._paths[tar], self._stamps[tar]) as file:
                return file.at(int(at["image"]) * BLOCK + offset, min(size, left))
        except OSError as error:
            raise self._bad(row, f"cannot be read: {error.strerror}", "Look at the disk") from error

    def where(self, row: int) -> tuple[Path, str]:
        tar = bisect_right(self._ends, row)
        return self._paths[tar], self._key(tar, int(self._rows[row]["image"]))

    def digests(self) -> dict[str, str]:
        return dict(self._digests)

    def close(self) -> None:
        self._files.close()

    def _bad(self, row: int, reason: str, remedy: str) -> BadSample:
        path, key = self.where(row)
        return BadSample(Fault(path, key, reason, remedy))

    def _columns(self, rows: np.ndarray, captions: bool) -> np.ndarray:
        """What reading needs of the rows of a tar: of two captions the one that `cap_source` asks for."""
        columns = ["image", "image_size", *(["source", "source_size"] if self._sources else [])]
        if not captions:
            kept = np.empty(len(rows), dtype=[(name, "<u4") for name in columns])
        else:
            names = [*columns, "caption", "caption_size"]
            kept = np.empty(len(rows), dtype=[*((name, "<u4") for name in names), ("json", "?")])
            prefers_json = self._options.cap_source is not None
            kept["json"] = (rows["json"] > 0) if prefers_json else (rows["text"] == 0)
            for part in ("", "_size"):
                kept[f"caption{part}"] = np.where(kept["json"], rows[f"json{part}"], rows[f"text{part}"])
        for name in columns:
            kept[name] = rows[name]
        return kept

    def _silent(self, tar: int, images: np.ndarray, reason: str, remedy: str) -> list[Fault]:
        """The samples of a tar that lack something, by their pictures."""
        return [Fault(self._paths[tar], self._key(tar, int(image)), reason, remedy) for image in images]

    def _key(self, tar: int, image: int) -> str:
        with self._files.reading(self._paths[tar], self._stamps[tar]) as file:
            name = sample_name(name_at(file, image * BLOCK))[0]
        return sample_key(name, image * BLOCK, self._repeated[tar])
