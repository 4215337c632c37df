"""Tars, listings and folders of small pictures, to be spoiled by each test in its own way."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from glm_training.config import Config
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import ImageSet

SIZE = (100, 90)


def colour(number: int) -> tuple[int, int, int]:
    """Of the picture of a number: another one for each up to 4096."""
    return (number % 16) * 16, (number // 16 % 16) * 16, (number // 256) * 16


def picture(number: int, size: tuple[int, int] = SIZE, kind: str = "PNG") -> bytes:
    """A plain picture; ``size`` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(file, format=kind)
    return file.getvalue()


def noise(number: int, size: tuple[int, int]) -> bytes:
    """A PNG of noise of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captioned(numbers: range | list[int]) -> dict[str, bytes]:
    """BLIP3o style: `0007.png` and `0007.txt`, "picture 7"."""
    return {
        f"{number:04d}.{kind}": data
        for number in numbers
        for kind, data in (("png", picture(number)), ("txt", f"picture {number}\n".encode()))
    }


def tars(folder: Path, sizes: tuple[int, ...] = (5, 4, 3)) -> Path:
    """`folder` with tars of pictures numbered throughout."""
    first = 0
    for place, size in enumerate(sizes):
        write_tar(folder / f"{place:03d}.tar", captioned(range(first, first + size)))
        first += size
    return folder


def write_listing(folder: Path, count: int) -> Path:
    """`data.json` with pictures in `images/` and annotations in `notes/`."""
    for name in ("images", "notes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        (folder / f"images/{number}.png").write_bytes(picture(number))
        (folder / f"notes/{number}.json").write_text(
            json.dumps({"caption": f"picture {number}", "re_caption": f"again {number}"}), encoding="utf-8"
        )
        records.append({"image": f"images/{number}.png", "annotation": f"notes/{number}.json"})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def opened(path: Path, *, captions: bool = True, index_dir: Path | None = None, **options: object) -> ImageSet:
    reading = Reading(captions, index_dir)
    return open_sets([SetOptions(path, **options)], reading)[0]  # type: ignore[arg-type]


def dataset(path: Path, *, shaping: Shaping | None = None, captions: bool = True, **options: object) -> CaptionedImages:
    return CaptionedImages([opened(path, captions=captions)], shaping or Shaping(32, 32), **options)  # type: ignore[arg-type]


def captioned_config(folder: Path, **sections: object) -> Config:
    """A configuration that reads tars of twelve pictures in `folder`, which it makes, and holds none of them out."""
    images = [{"path": str(tars(folder))}] if not folder.exists() else [{"path": str(folder)}]
    tree: dict[str, object] = {"data": {}, **sections}
    size = {"height": 32, "width": 32}
    tree["data"] = {"images": images, "image_size": size, "num_workers": 0, "validation": 0.0, **tree["data"]}  # type: ignore[dict-item]
    return Config.model_validate(tree)
