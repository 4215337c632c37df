"""Which columns of a table hold the picture, its caption and the picture to edit, by the names in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

EDITED = ("edited_image", "target", "target_image", "output_image")
IMAGES = (
    *EDITED,
    "image", "file_name", "image_path", "image_file", "filename", "img", "file", "path", "jpg", "jpeg", "png", "webp",
)  # fmt: skip
SOURCES = ("source", "source_image", "original_image", "input_image")
CAPTIONS = ("prompt", "caption", "text", "edit_prompt", "instruction", "description", "captions", "prompts", "txt")
"""In the order in which they count; compared without case, and `x_file_name` is `x`, as in imagefolder."""


SET_CAP_SOURCE = (
    f"Name it {' or '.join(CAPTIONS[:3])}, or set cap_source to it, as in data.images: [{{path: ..., cap_source: ...}}]"
)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table: of the picture, its caption, the picture that was edited. ``others``: further
    ones that may be captions."""

    image: str
    caption: str | None = None
    source: str | None = None
    others: tuple[str, ...] = ()


class ColumnsMissing(ValueError):
    """A table that lacks a column; the message is what is wrong, ``remedy`` what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(reason)


def plain(name: str) -> str:
    """A column's name as it is compared."""
    lower = name.strip().lower()
    return lower.removesuffix("_file_name") or lower


def names_pictures(names: Sequence[str], cap_source: str | None = None) -> bool:
    """Whether a table of these columns lists captioned pictures."""
    known = {plain(name) for name in names}
    told = cap_source in names or not known.isdisjoint(CAPTIONS)
    return told and not known.isdisjoint(IMAGES)


def columns_of(
    names: Sequence[str], cap_source: str | None, *, captions: bool = True, sources: bool = False
) -> Columns:
    """The columns of a table with `names`. `captions`, `sources`: whether those are needed. Raises ColumnsMissing."""
    own = {plain(name): name for name in reversed(names)}  # of equal ones the first
    listed = ", ".join(names)
    image = next((own[name] for name in IMAGES if name in own), None)
    if image is None:
        remedy = f"Name it {', '.join(IMAGES[4:6])} or {EDITED[0]}"
        what = "pictures" if cap_source in names or any(name in own for name in CAPTIONS) else "pictures nor captions"
        remedy += "" if what == "pictures" else f", and the one with captions {' or '.join(CAPTIONS[:3])}"
        raise ColumnsMissing(f"has no column with {what}; it has {listed}", remedy)
    source = next((own[name] for name in SOURCES if name in own), None)
    if source is None and plain(image) in EDITED:  # of `image` and `edited_image` the first is the source
        source = next((own[name] for name in IMAGES if name not in EDITED and name in own), None)
    if source is None and sources:
        remedy = f"Name it {', '.join(SOURCES[:3])}, or train in mode t2i"
        raise ColumnsMissing(f"has no column with pictures to edit; it has {listed}", remedy)
    known = tuple(own[name] for name in CAPTIONS if name in own)
    if cap_source is not None and captions:
        if cap_source not in names:
            near = get_close_matches(cap_source, names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Set cap_source to one of them"
            raise ColumnsMissing(f"has no column {cap_source!r}, which cap_source names; it has {listed}", hint)
        return Columns(image, cap_source, source)
    if captions and not known:
        raise ColumnsMissing(f"has no column with captions; it has {listed}", SET_CAP_SOURCE)
    return Columns(image, known[0] if known else None, source, known[1:])
