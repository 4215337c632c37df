"""Captioned pictures in their own shapes: sizes from headers, nothing enlarged, stand-ins of the same size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from glm_training.data import DataError
from glm_training.data.captioned import sizes as sizes_module
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.held_out import HeldOutImages
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import ImageSet
from glm_training.data.captioned.split import hold_out
from glm_training.data.dataset import sizes_of
from glm_training.data.pictures.buckets import Buckets
from glm_training.data.pictures.images import decode_image, fitted
from glm_training.data.samplers.bucket_sampler import BucketSampler
from glm_training.data.samplers.sampler import StatefulSampler
from tests.data.captioned.building import noise, opened, picture, write_listing, write_tar

BUCKETS = Buckets(64 * 64, 32, smallest=32)
SHAPING = Shaping(64, 64, min_side=0, buckets=BUCKETS)
SHAPES = [(100, 100), (300, 100), (100, 300), (70, 64), (40, 60), (640, 480)]
"""(width, height) of six pictures."""
SIZES = [(64, 64), (32, 96), (96, 32), (64, 64), (32, 32), (64, 64)]
"""(height, width) that each has in a batch."""


def members(shapes: list[tuple[int, int]]) -> dict[str, bytes]:
    return {
        f"{number}.{kind}": data
        for number, shape in enumerate(shapes)
        for kind, data in (("png", noise(number, shape)), ("txt", f"picture {number}".encode()))
    }


def folder(path: Path, shapes: list[tuple[int, int]] = SHAPES) -> Path:
    path.mkdir()
    for name, data in members(shapes).items():
        (path / name).write_bytes(data)
    return path


def bucketed(*sets: ImageSet, shaping: Shaping = SHAPING, **options: object) -> CaptionedImages:
    return CaptionedImages(sets, shaping, measure=True, **options)  # type: ignore[arg-type]


def test_each_picture_is_cut_to_its_own_bucket(tmp_path: Path) -> None:
    data = bucketed(opened(folder(tmp_path / "set")))
    assert sizes_of(data) == SIZES
    for index, (width, height) in enumerate(SHAPES):
        batch = data.batch([index])
        assert batch.targets is not None and batch.original_sizes is not None and batch.crops is not None
        expected = fitted(decode_image(Path("x"), noise(index, (width, height))), *SIZES[index])
        assert torch.equal(batch.targets[0], expected.pixels / 255) and batch.prompts == [f"picture {index}"]
        assert batch.original_sizes.tolist() == [[height, width]] and batch.crops.tolist() == [list(expected.crop)]
        assert batch.targets.shape[2] <= height and batch.targets.shape[3] <= width, "nothing is enlarged"
    assert data.batch([0, 3, 5]).targets.shape == (3, 3, 64, 64)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="one size, not"):
        data.batch([0, 1])


def test_sizes_are_read_from_headers_alone_in_every_layout(tmp_path: Path, monkeypatch) -> None:
    """Of seven pictures of hundreds of kB at most 20 kB each are read, and nothing is decoded."""
    shapes = [(400, 300)] * 7
    sets = [
        opened(folder(tmp_path / "folder", shapes)),
        opened(write_tar(tmp_path / "a.tar", members(shapes))),
    ]
    monkeypatch.setattr(sizes_module, "upright_size", _counting(counts := []))
    for one in sets:
        counts.clear()
        monkeypatch.setattr(type(one), "read", lambda self, row: pytest.fail("was read whole"))
        data = bucketed(one, try_first=0)
        assert sizes_of(data) == [(64, 64)] * 7
        assert len(counts) == 7 and max(counts) < 20_000
    listed = bucketed(opened(write_listing(tmp_path / "listed", 3)), try_first=0)
    assert sizes_of(listed) == [(64, 64)] * 3  # 100 x 90 pixels


def _counting(counts: list[int]):
    real = sizes_module.upright_size

    def counted(path, part, whole):
        taken = [0]

        def reading(offset: int, size: int) -> bytes:
            data = part(offset, size)
            taken[0] += len(data)
            return data

        size = real(path, reading, whole)
        counts.append(taken[0])
        return size

    return counted


def test_what_has_no_bucket_is_left_out_named_and_never_drawn(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", [*SHAPES, (20, 150), (250, 31)])
    data = bucketed(opened(path), skipped_dir=tmp_path / "run")
    assert len(data) == 6 and sizes_of(data) == SIZES
    assert data.remarks == [
        "of the pictures 2 left out: a side of at most 0 px (data.min_side), no bucket (32 px and more), or sides of "
        "more than 10 to 1 (data.max_aspect)"
    ]
    data.batch([0])
    lines = [json.loads(line) for line in (tmp_path / "run/skipped_samples.jsonl").read_text().splitlines()]
    assert [(line["kind"], Path(line["file"]).name) for line in lines] == [
        ("unsuitable", "6.png"),
        ("unsuitable", "7.png"),
    ]
    assert lines[0]["reason"] == "has 20 x 150 pixels, and the smallest bucket is 32 x 32"
    with pytest.raises(DataError, match="2 samples, and all cannot be used"):
        bucketed(opened(folder(tmp_path / "small", [(20, 150), (250, 31)])))


def test_a_file_that_is_no_picture_is_known_before_training(tmp_path: Path) -> None:
    path = folder(tmp_path / "set")
    (path / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not an image"):
        bucketed(opened(path))
    data = bucketed(opened(path), max_bad_fraction=0.5, try_first=0)
    assert len(data) == 5 and sizes_of(data) == [SIZES[row] for row in (0, 1, 3, 4, 5)]


def test_what_stands_in_for_a_broken_picture_has_its_size(tmp_path: Path) -> None:
    """The header of picture 3 is whole and its pixels are not: 0 and 5 have its size, and either may stand in."""
    path = folder(tmp_path / "set")
    whole = (path / "3.png").read_bytes()
    (path / "3.png").write_bytes(whole[: len(whole) // 2])
    data = bucketed(opened(path), max_bad_fraction=0.5, try_first=0)
    seen = Counter(data.batch([3], epoch=epoch).prompts[0] for epoch in range(30))
    assert set(seen) == {"picture 0", "picture 5"}
    # the only one of its size: whatever can be read of the set, cut to that size
    whole = (path / "4.png").read_bytes()
    (path / "4.png").write_bytes(whole[: len(whole) // 2])
    data = bucketed(opened(path), max_bad_fraction=0.5, try_first=0)
    assert data.batch([4]).targets.shape == (1, 3, 32, 32)  # type: ignore[union-attr]


def test_every_picture_comes_once_per_epoch_as_often_as_its_set_is_repeated(tmp_path: Path) -> None:
    sets = [opened(folder(tmp_path / "one", SHAPES[:3])), opened(folder(tmp_path / "two", [*SHAPES[3:], (20, 150)]))]
    data = bucketed(*sets, repeats=[2, 1])
    assert data.set_lengths == (6, 3)
    sampler = BucketSampler(StatefulSampler(len(data), 2, seed=1), sizes_of(data))
    for epoch in range(3):
        prompts: Counter[tuple[str, int]] = Counter()
        while sampler.position < 9 * (epoch + 1):
            indices = sampler.next()
            for index, prompt in zip(indices, data.batch(indices, epoch=epoch).prompts, strict=True):
                prompts[prompt, index < 6] += 1
        assert prompts == {("picture 0", True): 2, ("picture 1", True): 2, ("picture 2", True): 2} | {
            (f"picture {number}", False): 1 for number in range(3)
        }


def test_held_out_pictures_have_their_own_sizes(tmp_path: Path) -> None:
    pictures = CaptionedImages([opened(folder(tmp_path / "set", [(20, 150), *SHAPES]))], SHAPING, try_first=0)
    held_out = HeldOutImages(pictures, 4)
    assert sizes_of(held_out) == SIZES[:4]
    assert held_out.batch([0, 3]).targets.shape == (2, 3, 64, 64)  # type: ignore[union-attr]
    assert held_out.batch([1]).targets.shape == (1, 3, 32, 96)  # type: ignore[union-attr]


def test_enlarging_where_it_is_asked_for(tmp_path: Path) -> None:
    shaping = Shaping(64, 64, min_side=0, buckets=Buckets(64 * 64, 32, smallest=32, upscale=True))
    data = bucketed(opened(folder(tmp_path / "set", [(20, 30), (10, 10)])), shaping=shaping)
    assert sizes_of(data) == [(64, 64), (64, 64)]


def test_what_a_picture_was_edited_from_is_not_enlarged_either(tmp_path: Path) -> None:
    """Sources of 100 x 40 and of 300 x 300 px, of targets of 100 x 100; the third source is too small."""
    lines = []
    for number, shape in enumerate([(100, 40), (300, 300), (31, 90)]):
        (tmp_path / f"{number}.png").write_bytes(noise(number, (100, 100)))
        (tmp_path / f"from_{number}.png").write_bytes(noise(number + 9, shape))
        lines.append(json.dumps({"source": f"from_{number}.png", "target": f"{number}.png", "prompt": "x"}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (one,) = open_sets([SetOptions(tmp_path)], Reading(captions=True, sources=True))
    data = bucketed(one, sources=True)
    assert sizes_of(data) == [(32, 32), (64, 64)]
    batch = data.batch([0])
    assert batch.targets is not None and batch.sources is not None
    assert batch.targets.shape == batch.sources.shape == (1, 3, 32, 32)
    assert data.remarks[0].startswith("of the pictures 1 left out")


def test_a_picture_whose_source_is_too_small_is_passed_over_where_it_is_held_out(tmp_path: Path) -> None:
    """As in training: no bucket enlarges it."""
    rows = []
    for number, side in enumerate((90, 40, 90)):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (100, 90)))
        (tmp_path / f"source{number}.png").write_bytes(picture(9, (100, side)))
        rows.append(f"source{number}.png,{number}.png,dot {number}")
    (tmp_path / "x.csv").write_text("source,target,prompt\n" + "\n".join(rows))
    sets = open_sets([SetOptions(tmp_path)], Reading(True, sources=True))
    shaping = Shaping(128, 128, min_side=0, buckets=Buckets(128 * 128, 32))
    pictures = CaptionedImages(sets, shaping, try_first=0, sources=True)
    held_out = HeldOutImages(pictures, 3)
    assert [example.prompt for example in held_out.examples] == ["dot 0", "dot 2"]
    refused = pictures.tried(1)
    assert refused is not None and refused.fault.unsuitable
    kept, apart = hold_out(pictures, 0.999999)
    told = [one.read(row).caption for one in kept for row in range(len(one))]
    assert "dot 1" in told and len(told) == 2 and len(apart[0]) == 1  # one that can be used stays to be trained on
