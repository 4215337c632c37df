"""What is said of a set, and of how all sets are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SetOptions:
    """One set of pictures.

    Attributes:
        path: a file or folder.
        weight: its share of what is drawn, among the weights of all sets; None where sets are put one after the other.
        repeats: how often each of its samples comes in an epoch, without weights.
        cap_source: key of JSON captions, or column of a table; where a tar has both `.txt` and `.json`, naming it takes
            the latter.
        root: folder below which a listing names its files; None = the listing's own.
        split: of a Hugging Face dataset; None = `train`, or the only one.
    """

    path: Path
    weight: float | None = None
    repeats: int = 1
    cap_source: str | None = None
    root: Path | None = None
    split: str | None = None


@dataclass(frozen=True)
class Reading:
    """How sets are opened.

    Attributes:
        captions: whether every sample needs a caption; else none is read.
        optional: whether a sample may do without a caption: it is then empty.
        sources: whether every sample needs the picture that it was edited from; else none is read.
        local_files_only: whether nothing is fetched from the hub.
        index_dir: where indexes of tars are kept; None keeps none.
        threads: files looked at at the same time.
        rank, world_size: of this process: those that share ``index_dir`` each begin at another tar.
        tell: takes lines on how far work is that takes long.
    """

    captions: bool
    index_dir: Path | None = None
    threads: int = 1
    rank: int = 0
    world_size: int = 1
    optional: bool = False
    sources: bool = False
    local_files_only: bool = False
    tell: Callable[[str], None] | None = None
