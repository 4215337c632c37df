"""A folder of pictures, subfolders too, each with its caption in a file of the same stem beside it: `.txt`, `.caption`
or `.json`. Where captions are not needed, pictures alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.samples import (
    DEFAULT_KEY,
    HASHED_CAPTIONS,
    BadSample,
    CaptionFault,
    Encoded,
    Fault,
    StringTable,
    bounds,
    caption_of_json,
    caption_of_text,
    read_below,
    with_captions,
)
from glm_training.data.captioned.sniff import IMAGE_SUFFIXES, kind_in_folder, kind_of, some_files_below, walk_below
from glm_training.data.problems import DataError, Problem
from glm_training.data.text_lines import UNREAD_IMAGE
from glm_training.utils.words import counted

NAME = "a folder of pictures, each with a .txt of the same name beside it"
SUFFIXES = (".txt", ".TXT", ".caption", ".CAPTION", ".json", ".JSON")
"""Of captions; where a picture has several the first one counts, or .json where `cap_source` is given."""

_JSON_FIRST = (4, 5, 0, 1, 2, 3)
"""Places in SUFFIXES."""

_NONE = len(SUFFIXES)
_WHOLE = _NONE + 1

_REPEATS = re.compile(r"0*([2-9]|[1-9]\d{1,2})_\S")
"""Folders' names that begin with how often their pictures are to come, as kohya's scripts read them."""


def caption_beside(path: Path, kind: int) -> Path:
    """The caption of a picture: with suffix number `kind` in place of its own (`a.txt` of `a.jpg`), or from `_WHOLE`
    on behind it (`a.jpg.txt`)."""
    return path.with_suffix(SUFFIXES[kind]) if kind < _NONE else path.with_name(path.name + SUFFIXES[kind - _WHOLE])


def _folded(name: str) -> str:
    """A caption's name without the case of its suffix, and in one of Unicode's forms: files that were packed on a Mac
    have another one than what is written elsewhere."""
    stem, suffix = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def has_caption(picture: Path) -> bool:
    """Whether a caption lies beside a picture."""
    places = [*range(_NONE), *range(_WHOLE, _WHOLE + len(SUFFIXES))]
    return any(caption_beside(picture, place).is_file() for place in places)


class PicturesAlone:
    """Whether a folder's pictures need no table, listing or tar: they have captions beside them, or need none. A file
    that names none of them is then of something else. `files` of the folder, of these `kinds`.

    ``not_read``: files that were found to be so, and why.
    """

    def __init__(self, options: SetOptions, reading: Reading, files: Sequence[Path], kinds: Sequence[str]) -> None:
        self.not_read: dict[Path, Problem] = {}
        self._path = options.path
        self._captions, self._sources = reading.captions, reading.sources
        self._files, self._kinds = list(files), list(kinds)

    @cached_property
    def with_those_below(self) -> tuple[list[Path], list[str]]:
        """Files of the folder and of those below it, and their kinds."""
        below = some_files_below(self._path)
        return [*self._files, *below], [*self._kinds, *map(kind_in_folder, below)]

    def are_there(self) -> bool:
        """Among the files that are looked at, more often than tars."""
        if self._sources:  # which no folder of pictures has
            return False
        files, kinds = self.with_those_below
        pictures = (file for file, kind in zip(files, kinds, strict=True) if kind == "image")
        count = sum(1 for file in pictures if not self._captions or has_caption(file))
        return count > kinds.count("tar")


def why_not_read(folder: Path, file: Path, error: DataError) -> Problem:
    """What `error` says of a file of a folder, rather than of the folder."""
    own = [problem for problem in error.problems if problem.path != folder] or error.problems
    return replace(own[0], path=file)


def open_set(options: SetOptions, reading: Reading, elsewhere: Collection[Path] = ()) -> FolderSet:
    """The pictures below the folder. `elsewhere`: files that others tell of.

    Raises DataError with all that no quarantine cures.
    """
    found = FolderSet(options, reading, elsewhere)
    if len(found) == 0:
        problems = [fault.problem() for fault in found.faults[:1]]
        if found.faults:
            lonely = found.orphans
            others = f", and {counted(len(lonely), 'text')} no picture ({lonely[0]})" if lonely else ""
            told = Problem(
                options.path,
                f"none of its pictures has a caption{others}",
                "Add a .txt of the same name beside each, or set data.trigger_word",
            )
        else:
            told = Problem(options.path, "holds no picture", f"Give {NAME}")
        raise DataError([told, *problems])
    return found


def _kind(path: Path) -> str:
    """As `kind_of`, but by its suffix alone where that is a picture's."""
    return "image" if path.suffix.lower() in IMAGE_SUFFIXES else kind_of(path)


class FolderSet:
    """See :class:`ImageSet`. In memory a sample is its path below the folder and 9 bytes."""

    layout = NAME

    def __init__(self, options: SetOptions, reading: Reading, elsewhere: Collection[Path]) -> None:
        self.name = str(options.path)
        self.faults: list[Fault] = []
        self.remarks: list[str] = []
        self._options = options
        self._captions, self._optional = reading.captions, reading.optional
        self._root = options.path
        self._real_root = bounds(options.path)
        self._digests: dict[str, str] = {}
        self._elsewhere = elsewhere
        self._spelled: dict[str, str] = {}
        """Names of captions that `caption_beside` does not tell, by picture."""
        self.orphans: list[str] = []
        """Texts below the folder that are beside no picture."""
        self._twice: list[tuple[str, ...]] = []
        paths: list[str] = []
        kinds: list[int] = []
        repeats: dict[str, str] = {}
        for folder, names in walk_below(self._root):
            found = self._in_folder(folder, names)
            paths += [path for path, _ in found]
            kinds += [kind for _, kind in found]
            number = _REPEATS.match(Path(folder).name) if found else None
            if number is not None and (Path(folder) != self._root or (options.repeats == 1 and options.weight is None)):
                repeats[folder] = number[1]
        self._paths = StringTable(paths)
        self._kinds = np.array(kinds, dtype=np.uint8)
        if self._twice and reading.captions:
            counts, *others = self._twice[0]
            told = f"{counted(len(self._twice), 'picture')} with two captions; {counts} counts"
            many = "and so on" if len(self._twice) > 1 else ""
            self.remarks.append(f"{self.name}: {', '.join(filter(None, [told, f'not {others[0]}', many]))}")
        self._tell_repeats(repeats)
        if self.orphans and reading.captions:
            shown = ", ".join(self.orphans[:3])
            self.remarks.append(f"{self.name}: {counted(len(self.orphans), 'text')} without a picture ({shown})")

    def _in_folder(self, folder: str, names: list[str]) -> list[tuple[str, int]]:
        """Path below the root of each picture, and which file beside it is its caption: see `caption_beside`."""
        below = os.path.relpath(folder, self._root)
        texts = {name for name in names if name.lower().endswith(SUFFIXES)}
        folded = {_folded(name): name for name in sorted(texts)}
        told: set[str] = set()
        found: list[tuple[str, int]] = []
        digest = hashlib.sha256()
        order = range(len(SUFFIXES)) if self._options.cap_source is None else _JSON_FIRST
        for name in names:
            path, stem = Path(folder, name), os.path.splitext(name)[0]
            kind_of_file = "text" if name in texts else _kind(path)
            if kind_of_file not in ("image", "unread image"):
                continue
            beside = {place: stem + SUFFIXES[place] for place in order}
            beside |= {_WHOLE + place: name + SUFFIXES[place] for place in order}
            for place, text in beside.items():
                beside[place] = text if text in texts else folded.get(_folded(text), text)
            told.update(beside.values())
            if kind_of_file == "unread image":
                self.faults.append(Fault(path, "", *UNREAD_IMAGE))
                continue
            there = [place for place, text in beside.items() if text in texts]
            captions = tuple(dict.fromkeys(beside[place] for place in there))
            self._twice += [captions] if len(captions) > 1 else []
            kind = there[0] if there else _NONE
            files = [name]
            if kind != _NONE:
                files.append(beside[kind])
            try:
                for file in files if self._captions else files[:1]:
                    size = os.stat(os.path.join(folder, file)).st_size
                    digest.update(f"{len(os.fsencode(file))} ".encode() + os.fsencode(file) + f" {size}\n".encode())
            except OSError as error:  # a link to nothing
                self.faults.append(Fault(path, "", f"cannot be read: {error.strerror}", "Put the file there"))
                continue
            if kind == _NONE and self._captions and not self._optional:
                self.faults.append(Fault(path, "", "has no caption", f"Write it into {path.with_suffix('.txt').name}"))
                continue
            picture = name if below == "." else os.path.join(below, name)
            found.append((picture, kind))
            if kind != _NONE and caption_beside(path, kind).name != beside[kind]:
                self._spelled[picture] = beside[kind]
        lonely = (Path(folder, name) for name in sorted(texts - told))
        self.orphans += [str(path.relative_to(self._root)) for path in lonely if path not in self._elsewhere]
        if names:
            self._digests[str(Path(folder))] = digest.hexdigest()
        return found

    def _tell_repeats(self, repeats: Mapping[str, str]) -> None:
        """Says that numbers of the folders' names, by folder, do nothing here."""
        if repeats:
            sets = ", ".join(f"{{path: {folder}, repeats: {number}}}" for folder, number in list(repeats.items())[:3])
            more = ", ..." if len(repeats) > 3 else ""
            told = "each picture counts once, whatever number a folder's name begins with"
            self.remarks.append(f"{self.name}: {told}; to have some more often: data.images: [{sets}{more}]")

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, row: int) -> Encoded:
        image = read_below(self._real_root, self._root / self._paths[row])
        if not self._captions:
            return Encoded(image, None)
        if self._kinds[row] == _NONE:
            return Encoded(image, "")
        beside = self._caption(row)
        data = read_below(self._real_root, beside)
        try:
            if beside.suffix.lower() == ".json":
                key = self._options.cap_source or DEFAULT_KEY
                return Encoded(image, caption_of_json(data, key, row, optional=self._optional))
            return Encoded(image, caption_of_text(data, row, optional=self._optional))
        except CaptionFault as fault:
            raise BadSample(Fault(beside, "", fault.reason, fault.remedy)) from fault

    def part(self, row: int, offset: int, size: int) -> bytes:
        return read_below(self._real_root, self._root / self._paths[row], offset, size)

    def where(self, row: int) -> tuple[Path, str]:
        return self._root / self._paths[row], ""

    def digests(self) -> dict[str, str]:
        if not self._captions:
            return dict(self._digests)
        told = [row for row in range(min(len(self), HASHED_CAPTIONS + 1)) if self._kinds[row] != _NONE]
        beside = [self._caption(row) for row in told]
        return with_captions(self._digests, [(str(path.parent), path) for path in beside], self._real_root)

    def _caption(self, row: int) -> Path:
        place = self._paths[row]
        usual = caption_beside(self._root / place, int(self._kinds[row]))
        return usual.with_name(self._spelled.get(place, usual.name))

    def close(self) -> None:
        """Nothing stays open."""
