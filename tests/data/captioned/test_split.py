"""Which pictures are held out: by their content, whatever else there is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from glm_training.data import DataError
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.samples import ImageSet
from glm_training.data.captioned.split import hold_out
from tests.data.captioned.building import opened, picture


def write(folder: Path, numbers: range | list[int]) -> Path:
    """Pictures with "picture N" beside each."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.png").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    return folder


def split(*folders: Path, fraction: float, **options: float) -> tuple[list[str], list[str]]:
    """Captions that are kept, and those that are held out."""
    pictures = CaptionedImages([opened(folder) for folder in folders], Shaping(32, 32), try_first=0, **options)
    kept, apart = hold_out(pictures, fraction, threads=2)
    return captions(kept), captions(apart)


def captions(sets: list[ImageSet]) -> list[str]:
    return [str(one.read(row).caption) for one in sets for row in range(len(one))]


def place(number: int) -> float:
    """Of a picture's digest between the smallest and the largest, from 0 to 1."""
    return int(hashlib.sha256(picture(number)).hexdigest()[:16], 16) / 2**64


def test_those_of_the_smallest_digests(tmp_path: Path) -> None:
    kept, apart = split(write(tmp_path / "a", range(60)), fraction=0.2)
    assert apart == [f"picture {number}" for number in range(60) if place(number) < 0.2]
    assert kept == [f"picture {number}" for number in range(60) if place(number) >= 0.2]
    assert 3 <= len(apart) <= 21  # of 60 at 0.2: three standard deviations (3.1) about 12


def test_more_pictures_and_other_names_change_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", range(20, 40))
    before = split(folder, fraction=0.2)[1]
    write(folder, [*range(20), *range(40, 60)])
    (folder / "030.png").rename(folder / "zzz.png")
    (folder / "030.txt").rename(folder / "zzz.txt")
    after = split(folder, fraction=0.2)[1]
    assert {name for name in after if 20 <= int(name.split()[1]) < 40} == set(before)
    assert len(after) > len(before)


def test_a_few_at_least(tmp_path: Path) -> None:
    order = sorted(range(40), key=place)
    for count, least in ((2, 1), (15, 1), (16, 2), (31, 3), (32, 4), (40, 4)):
        folder = write(tmp_path / f"{count}", sorted(order[:count]))
        assert set(split(folder, fraction=1e-6)[1]) == {f"picture {number}" for number in order[:least]}


def test_one_at_least_and_copies_on_one_side(tmp_path: Path) -> None:
    first = min(range(10), key=place)
    folder = write(tmp_path / "a", range(10))
    assert split(folder, fraction=1e-6)[1] == [f"picture {first}"]
    (folder / "copy.png").write_bytes(picture(first))
    (folder / "copy.txt").write_text("a copy")
    assert split(folder, fraction=1e-6)[1] == [f"picture {first}", "a copy"]
    other = write(tmp_path / "b", [first, 11])
    assert split(folder, other, fraction=1e-6)[1] == [f"picture {first}", "a copy", f"picture {first}"]


def test_what_cannot_be_used_is_not_held_out(tmp_path: Path) -> None:
    order = sorted(range(10), key=place)
    folder = write(tmp_path / "a", range(10))
    broken = next(data for data in (b"\x89PNG%d" % n for n in range(10**4)) if hashlib.sha256(data).digest()[0] == 0)
    (folder / "broken.png").write_bytes(broken)
    (folder / "broken.txt").write_text("broken")
    kept, apart = split(folder, fraction=1e-6, max_bad_fraction=0.5)
    assert apart == [f"picture {order[0]}"] and "broken" in kept
    (folder / f"{order[0]:03d}.png").write_bytes(broken)
    assert split(folder, fraction=1e-6, max_bad_fraction=0.5)[1] == [f"picture {order[1]}"]


def test_no_set_is_left_empty(tmp_path: Path) -> None:
    least = min(range(10), key=place)
    single, others = write(tmp_path / "single", [least]), write(tmp_path / "a", [n for n in range(10) if n != least])
    kept, apart = split(single, others, fraction=0.999999)
    assert f"picture {least}" in kept and len(apart) == 8 and len(kept) == 2
    with pytest.raises(DataError, match=r"no picture to spare to be held out\. Set data\.validation to 0"):
        split(single, fraction=0.05)


def test_where_no_picture_can_be_used_it_says_why(tmp_path: Path) -> None:
    small = write(tmp_path / "a", range(7))
    pictures = CaptionedImages([opened(small)], Shaping(32, 32, min_side=90), try_first=0)
    with pytest.raises(DataError) as caught:
        hold_out(pictures, 0.05)
    heading, *problems = str(caught.value).splitlines()
    assert heading == f"{small}: none of 7 pictures can be used, the first of them:" and len(problems) == 5
    assert "has 100 x 90 pixels. Lower data.min_side (90)" in problems[0]
    assert "max_bad_fraction" not in problems[0]  # such are left out, whatever it allows
    for number in range(1, 7):
        (small / f"{number:03d}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no picture to spare to be held out: 6 of its 7 cannot be used. Set data.val"):
        split(small, fraction=0.05)
