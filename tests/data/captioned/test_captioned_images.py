"""Batches of captioned pictures: the right pixels on every process, and something in place of what is broken."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from glm_training.data import DataError, describe_drift
from glm_training.data.captioned import dataset as module
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from tests.data.captioned.building import captioned, colour, dataset, noise, opened, picture, tars, write_tar

SHAPING = Shaping(32, 32)


def pixels(data: bytes, shaping: Shaping, centring: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """What Pillow alone makes of a picture: float [3, H, W]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    fitted = ImageOps.fit(image, (shaping.width, shaping.height), Image.Resampling.LANCZOS, centering=centring)
    return torch.tensor(list(fitted.tobytes())).view(shaping.height, shaping.width, 3).permute(2, 0, 1) / 255


def targets(data: CaptionedImages, indices: list[int], epoch: int = 0) -> torch.Tensor:
    batch = data.batch(indices, epoch=epoch)
    assert batch.targets is not None and batch.sources is None and batch.indices == indices
    return batch.targets


def test_a_batch(tmp_path: Path) -> None:
    data = dataset(tars(tmp_path / "set"))
    assert len(data) == 12 and data.remarks == []
    batch = data.batch([11, 4, 4])
    assert batch.prompts == ["picture 11", "picture 4", "picture 4"]
    assert batch.targets is not None and batch.targets.dtype == torch.float32
    assert batch.targets.shape == (3, 3, 32, 32)
    assert batch.targets.mul(255)[:, :, 7, 20].tolist() == [list(colour(number)) for number in (11, 4, 4)]
    assert data.where(11) == (tmp_path / "set" / "002.tar", "0011")


@pytest.mark.parametrize("bad", [[], [12], [-1]])
def test_positions_out_of_place(tmp_path: Path, bad: list[int]) -> None:
    data = dataset(tars(tmp_path / "set"))
    with pytest.raises((ValueError, IndexError), match="position"):
        data.batch(bad)
    with pytest.raises(ValueError, match="2 epochs were given for 1 positions"):
        data.batch([1], epoch=[0, 0])


def test_the_centre_is_what_pillow_cuts(tmp_path: Path) -> None:
    data = dataset(
        write_tar(tmp_path / "a.tar", {"0.png": noise(0, (200, 120)), "0.txt": b"x"}), shaping=Shaping(40, 48)
    )
    assert torch.equal(targets(data, [0], epoch=3)[0], pixels(noise(0, (200, 120)), Shaping(40, 48)))


def test_random_crops_are_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    members = {f"{row}.{kind}": data for row in (0, 1) for kind, data in (("png", noise(0, (300, 100))), ("txt", b"x"))}
    path = write_tar(tmp_path / "a.tar", members)
    shaping = Shaping(32, 32, crop="random")
    data = dataset(path, shaping=shaping, seed=1)
    places = [(epoch, row) for epoch in range(20) for row in (0, 1)]
    cuts = [targets(data, [row], epoch)[0] for epoch, row in places]
    again = dataset(path, shaping=shaping, seed=1)
    for (epoch, row), cut in reversed(list(zip(places, cuts, strict=True))):
        assert torch.equal(targets(again, [row], epoch)[0], cut)
    assert len({cut.numpy().tobytes() for cut in cuts}) == 40
    other = dataset(path, shaping=shaping, seed=2)
    assert not torch.equal(targets(other, [0])[0], cuts[0])
    # 300 x 100 is cut to a square somewhere between the left and the right: the mean of 40 uniform places is one half
    # with a standard deviation of 0.289 / sqrt(40) = 0.046
    lefts = [place / 100 for place in range(101)]
    whole = [pixels(noise(0, (300, 100)), shaping, (left, 0.5)) for left in lefts]
    crops = [data.batch([row], epoch=epoch).crops for epoch, row in places]
    found = [lefts[min(range(101), key=lambda i: (whole[i] - cut).abs().sum().item())] for cut in cuts]  # noqa: B023
    assert abs(sum(found) / 40 - 0.5) < 0.2 and min(found) < 0.2 and max(found) > 0.8
    # resized to 96 x 32 it has 64 columns too many; `found` is told to a hundredth of them, `crops` to a whole one
    assert all(abs(crop[0, 1].item() - 64 * left) < 1.2 for crop, left in zip(crops, found, strict=True))  # type: ignore[index]
    assert all(crop[0, 0] == 0 for crop in crops)  # type: ignore[index]


def test_original_sizes_crops_and_the_size_of_an_item(tmp_path: Path) -> None:
    """120 x 200 (width x height) covers 48 x 40 as 48 x 80, of which 20 rows are cut off at the top."""
    data = dataset(
        write_tar(tmp_path / "a.tar", {"0.png": noise(0, (120, 200)), "0.txt": b"x"}), shaping=Shaping(40, 48)
    )
    batch = data.batch([0, 0])
    assert batch.original_sizes is not None and batch.original_sizes.tolist() == [[200, 120]] * 2
    assert batch.crops is not None and batch.crops.tolist() == [[20, 0]] * 2
    assert data.size_of(0) == (40, 48)
    with pytest.raises(IndexError, match="position 1 is outside"):
        data.size_of(1)


def test_flips_where_the_caption_allows(tmp_path: Path) -> None:
    members = {}
    for row in range(40):
        text = b"a dot at the left" if row % 2 else b"a dot"
        members |= {f"{row:02d}.png": noise(row, (100, 100)), f"{row:02d}.txt": text}
    path = write_tar(tmp_path / "a.tar", members)
    plain, flipping = (dataset(path, shaping=Shaping(32, 32, flip=flip)) for flip in (False, True))
    rows = list(range(40))
    kept, flipped = targets(plain, rows), targets(flipping, rows)
    same = [torch.equal(flipped[row], kept[row]) for row in rows]
    turned = [torch.equal(flipped[row], kept[row].flip(-1)) for row in rows]
    assert all(same[1::2]) and not any(turned[1::2])
    assert [a or b for a, b in zip(same, turned, strict=True)] == [True] * 40
    assert 3 <= sum(turned) <= 17  # of 20 fair coins: mean 10, standard deviation 2.24


def test_threads_and_prefetch_change_nothing(tmp_path: Path) -> None:
    shaping = Shaping(32, 32, crop="random")
    path = tars(tmp_path / "set")
    alone, threads = dataset(path, shaping=shaping), dataset(path, shaping=shaping, num_workers=3)
    threads.prefetch([1, 2, 3], epoch=[0, 1, 1])
    assert set(threads._pending) == {(1, 0), (2, 1), (3, 1)}
    threads.prefetch([3, 4], epoch=1)  # 1 and 2 are let go
    assert set(threads._pending) == {(3, 1), (4, 1)}
    for indices, epoch in (([3, 4], 1), ([4, 4, 0], 0), (list(range(12)), 2)):
        assert torch.equal(targets(threads, indices, epoch), targets(alone, indices, epoch))
    threads.close()
    assert threads.batch([5]).prompts == ["picture 5"]
    threads.close()


def test_several_sets_and_repeats(tmp_path: Path) -> None:
    sets = [opened(tars(tmp_path / "a", (2,))), opened(write_tar(tmp_path / "b.tar", captioned([50, 51, 52, 53])))]
    data = CaptionedImages(sets, SHAPING, repeats=[3, 1])
    assert len(data) == 10 and data.set_lengths == (6, 4)
    assert [data.batch([row]).prompts[0] for row in (0, 1, 2, 5, 6, 9)] == [
        f"picture {number}" for number in (0, 1, 0, 1, 50, 53)
    ]
    assert data.example_digests().keys() == {str(tmp_path / "a/000.tar"), str(tmp_path / "b.tar")}


def test_drift_names_the_tar(tmp_path: Path) -> None:
    path = tars(tmp_path / "set")
    before = dataset(path).example_digests()
    write_tar(path / "001.tar", captioned([5, 6, 7]))
    write_tar(path / "003.tar", captioned([50]))
    (path / "002.tar").unlink()
    after = dataset(path).example_digests()
    assert describe_drift(before, before) == []
    assert describe_drift(before, after) == [
        f"{path / '001.tar'}: what is in it changed", f"{path / '002.tar'}: removed", f"{path / '003.tar'}: added"
    ]  # fmt: skip


# -- what cannot be used -----------------------------------------------------------------------------------------------


def broken_tar(path: Path, count: int, broken: set[int]) -> Path:
    members = captioned(range(count)) | {f"{number:04d}.png": b"\x89PNG broken" for number in broken}
    return write_tar(path, members)


def test_a_broken_picture_is_an_error_before_training(tmp_path: Path) -> None:
    path = broken_tar(tmp_path / "a.tar", 10, {3, 7})
    with pytest.raises(DataError) as caught:
        dataset(path)
    text = str(caught.value)
    assert (
        text.startswith("2 of 10 samples cannot be used:") and f"{path}: 0003: " in text and f"{path}: 0007: " in text
    )
    assert "let data.max_bad_fraction leave such samples out" in text


def test_up_to_the_fraction_they_are_left_out_and_counted(tmp_path: Path) -> None:
    path = broken_tar(tmp_path / "a.tar", 10, {3, 7})
    with pytest.raises(DataError, match=r"2 of 10 samples cannot be used \(data.max_bad_fraction 0.19\)"):
        dataset(path, max_bad_fraction=0.19)
    data = dataset(path, max_bad_fraction=0.2)
    assert data.remarks == ["2 samples left out as broken, each named in skipped_samples.jsonl"]
    whole = {f"picture {number}" for number in range(10) if number not in (3, 7)}
    for epoch in range(5):
        prompts = data.batch(list(range(10)), epoch=epoch).prompts
        assert [prompt for row, prompt in enumerate(prompts) if row not in (3, 7)] == [
            f"picture {number}" for number in range(10) if number not in (3, 7)
        ]
        assert {prompts[3], prompts[7]} <= whole


def test_broken_samples_of_one_name_count_each(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for data in (b"broken", b"as well", picture(2)):
            for name, content in (("k.png", data), ("k.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match="2 of 3 samples cannot be used") as caught:
        dataset(tmp_path / "a.tar", max_bad_fraction=0.5)
    assert "k (byte 512): is not an image" in str(caught.value) and "k (byte 2560): is not" in str(caught.value)


def test_faults_that_were_known_before_count_too(tmp_path: Path) -> None:
    path = tars(tmp_path / "set", (5, 4))
    (path / "002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 10 samples cannot be used:\n.*002\.tar: is empty"):
        dataset(path)
    assert len(dataset(path, max_bad_fraction=0.1)) == 9


def test_what_stands_in_is_a_function_of_integers(tmp_path: Path) -> None:
    path = broken_tar(tmp_path / "a.tar", 40, set(range(0, 40, 2)))
    first, second = (dataset(path, max_bad_fraction=0.5, seed=4, num_workers=workers) for workers in (0, 2))
    drawn = [first.batch(list(range(40)), epoch=epoch).prompts for epoch in range(3)]
    backwards = [[second.batch([row], epoch=epoch).prompts[0] for row in reversed(range(40))] for epoch in (2, 1, 0)]
    assert drawn == [prompts[::-1] for prompts in reversed(backwards)]
    assert drawn[0] != drawn[1]
    assert len({prompts[row] for prompts in drawn for row in range(0, 40, 2)}) > 10
    second.close()


def test_a_set_that_is_all_broken_is_an_error(tmp_path: Path) -> None:
    broken = broken_tar(tmp_path / "b.tar", 3, {0, 1, 2})
    sets = [opened(tars(tmp_path / "a")), opened(broken)]
    with pytest.raises(DataError, match=r"b\.tar: 3 samples, and all cannot be used, the first.*:\n.*b\.tar: 0000"):
        CaptionedImages(sets, SHAPING, max_bad_fraction=0.9)


def test_attempts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All broken, which the samples tried before training did not show."""
    path = broken_tar(tmp_path / "a.tar", 5, set(range(5)))
    data = dataset(path, max_bad_fraction=1.0, try_first=0)
    reads = []
    read = data.sets[0].read
    monkeypatch.setattr(data.sets[0], "read", lambda row: (reads.append(row), read(row))[1])
    with pytest.raises(DataError, match="100 samples drawn one after the other cannot be used:"):
        data.batch([2])
    assert len(reads) == module.ATTEMPTS and reads[0] == 2 and set(reads) == set(range(5))


def test_above_the_fraction_the_step_fails(tmp_path: Path) -> None:
    path = broken_tar(tmp_path / "a.tar", 20, {3, 5, 7})
    data = dataset(path, max_bad_fraction=0.1, try_first=0)
    assert data.batch([3, 5]).prompts[0] != "picture 3"
    data.batch([5, 3], epoch=1)  # known already
    with pytest.raises(DataError, match=r"3 of 20 samples cannot be used \(data.max_bad_fraction 0.1\)"):
        data.batch([7])


@pytest.mark.parametrize(
    ("size", "kept"), [((81, 90), True), ((80, 90), False), ((90, 80), False), ((900, 90), True), ((910, 90), False),
                       ((90, 910), False)]
)  # fmt: skip
def test_small_and_long_pictures_are_left_out_and_no_fault(tmp_path: Path, size: tuple[int, int], kept: bool) -> None:
    members = captioned(range(1, 4)) | {"0000.png": picture(0, size), "0000.txt": b"odd"}
    data = dataset(write_tar(tmp_path / "a.tar", members))
    odd = next(row for row in range(4) if data.where(row)[1] == "0000")
    assert (data.batch([odd]).prompts == ["odd"]) == kept
    assert data.skipped.counts() == (0, 0 if kept else 1)
    assert bool(data.remarks) != kept and all("data.min_side" in remark for remark in data.remarks)


def test_sizes_that_are_asked_for(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": picture(0, (30, 8)), "0.txt": b"tiny"})
    with pytest.raises(DataError, match=r"has 30 x 8 pixels. Lower data.min_side"):
        dataset(path)
    assert dataset(path, shaping=Shaping(32, 32, min_side=0)).batch([0]).prompts == ["tiny"]
    with pytest.raises(DataError, match="has 30 x 8 pixels"):
        dataset(path, shaping=Shaping(32, 32, min_side=0, max_aspect=3.7))


def test_a_key_that_no_caption_has_is_known_before_training(tmp_path: Path) -> None:
    members = {
        f"{row:03d}.{kind}": data for row in range(300) for kind, data in (("png", picture(row)), ("json", b"{}"))
    }
    members["000.json"] = members["299.json"] = b'{"caption": "fine"}'
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"of 300 samples cannot be used \(data.max_bad_fraction 0.5\)"):
        dataset(path, max_bad_fraction=0.5)
    members["000.json"] = b"{}"
    with pytest.raises(DataError, match=r"300 samples, and all of 256 that were tried cannot be used"):
        dataset(write_tar(path, members), max_bad_fraction=0.9)


def test_a_tar_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", captioned(range(3)))
    data = dataset(path)
    data.close()
    write_tar(path, captioned(range(4)))
    with pytest.raises(DataError, match="changed since the run began. Put the old one back"):
        data.batch([0])


@pytest.mark.parametrize("change", ["cut", "other samples", "as long"])
def test_a_tar_that_is_written_over_in_place_while_it_is_open(tmp_path: Path, change: str) -> None:
    """Its old offsets show something else by now, which must not be taken for samples, nor for broken ones."""
    path = write_tar(tmp_path / "a.tar", captioned(range(3)))
    data = dataset(path, max_bad_fraction=0.9)
    assert data.batch([2]).prompts == ["picture 2"]  # and the file stays open
    if change == "cut":
        os.truncate(path, 700)
    else:
        write_tar(path, captioned(range(4) if change == "other samples" else range(5, 8)))
        os.utime(path, ns=(0, 0))  # some later time, whatever the clock's ticks
    for index in range(3):
        with pytest.raises(DataError, match=r"a.tar: changed since the run began. Put the old one back"):
            data.batch([index])
    assert data.skipped.counts() == (0, 0)
    data.close()
