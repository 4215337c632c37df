"""Samples of a tar as webdataset groups them, and the files that keep where they lie."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from glm_training.data.captioned.layouts.tars.index import IndexCache, TarIndex, index_tar, sample_name, stamp_of
from glm_training.data.captioned.layouts.tars.members import BLOCK
from glm_training.data.captioned.layouts.tars.open_files import OpenFiles
from glm_training.data.problems import DataError
from tests.data.captioned.building import captioned, picture, write_tar


def contents(path: Path, index: TarIndex) -> list[tuple[bytes, ...]]:
    """Bytes of picture, text and JSON of each row; empty where it has none."""
    data = path.read_bytes()
    return [
        tuple(data[row[part] * BLOCK : row[part] * BLOCK + row[f"{part}_size"]] for part in ("image", "text", "json"))
        for row in index.rows
    ]


def one(cache: IndexCache, path: Path) -> TarIndex:
    (index,) = cache.load([path], threads=1)
    assert isinstance(index, TarIndex)
    return index


def test_sample_names() -> None:
    assert sample_name("0001.jpg") == ("0001", "jpg")
    assert sample_name("a.b/c.d/0001.cls.TXT") == ("a.b/c.d/0001", "cls.txt")
    assert sample_name("plain") == ("plain", "")


def test_members_are_gathered_into_samples(tmp_path: Path) -> None:
    members = {
        "b.cls": b"7", "b.jpg": b"B", "b.txt": b"text of b", "b.json": b"{}",
        "._b.jpg": b"a Mac's", "sub/b.png": b"another b", "a.webp": b"A", "a.seg.png": b"a mask",
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members | {"late.jpg": b"L", "z.jpg": b"Z", "late.txt": b"text of late"})
    index = index_tar(path)
    assert index.faults == [] and index.first == list(members)[:5]
    assert contents(path, index) == [
        (b"B", b"text of b", b"{}"), (b"another b", b"", b""), (b"A", b"", b""), (b"L", b"text of late", b""),
        (b"Z", b"", b""),
    ]  # fmt: skip


def test_the_same_name_again_is_another_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", b"1"), ("a.txt", b"one"), ("a.jpg", b"2"), ("a.txt", b"two")):
            file = tmp_path / "file"
            file.write_bytes(data)
            tar.add(file, arcname=name)
    assert contents(path, index_tar(path)) == [(b"1", b"one", b""), (b"2", b"two", b"")]


def test_of_several_texts_of_a_sample_the_txt_counts(tmp_path: Path) -> None:
    members = {"a.caption": b"in vain", "a.jpg": b"A", "a.txt": b"text of a", "a.text": b"too late", "b.jpg": b"B"}
    path = write_tar(tmp_path / "a.tar", members)
    index = index_tar(path)
    assert contents(path, index) == [(b"A", b"text of a", b""), (b"B", b"", b"")] and index.faults == []


def test_samples_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", b""), ("a.txt", b"1"), ("a.jpg", b""), ("a.txt", b"2"), ("b.jpg", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    cache = IndexCache(tmp_path / "cache")
    for index in (one(cache, path), one(cache, path)):  # made, and kept
        assert index.faults == [
            (name, f"{name[0]}.jpg is empty") for name in ("a (byte 512)", "a (byte 2048)", "b")
        ] and index.repeated == {"a"}


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"n.cls": b"1", "n.v1.jpg": b"x", "e.jpg": b"", "l.txt": b"t", "g.jpg": b"G"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "g.jpg"
        tar.addfile(link)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"l.jpg") + BLOCK])
    write_tar(tmp_path / "b.tar", captioned(range(2)))
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"0001.png") + BLOCK + 20])
    assert index_tar(path).faults == [
        ("", "has no end mark: it may have been cut short"),
        ("n", "has no picture, only cls, v1.jpg (what follows the first dot is the kind)"),
        ("e", "e.jpg is empty"),
        ("l", "l.jpg is a link, which has no data of its own"),
    ]
    cut = index_tar(tmp_path / "b.tar")
    assert cut.faults == [("0001", "the tar ends inside 0001.png")]
    assert contents(tmp_path / "b.tar", cut) == [(picture(0), b"picture 0\n", b"")]


def test_an_index_is_made_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", captioned(range(3)))
    cache = IndexCache(tmp_path / "cache" / "deep")
    made = one(cache, path)
    (file,) = (tmp_path / "cache" / "deep").iterdir()
    facts, _, body = file.read_bytes().partition(b"\n")
    file.write_bytes(facts.replace(b'"first": ["', b'"first": ["kept ') + b"\n" + body)
    kept = one(cache, path)
    assert kept.first[0] == "kept 0000.png" and kept.digest == made.digest and kept.stamp == made.stamp
    assert kept.rows.tolist() == made.rows.tolist()
    assert one(IndexCache(None), path).first[0] == "0000.png"


@pytest.mark.parametrize("spoilt", [b"", b"{}", b"no JSON\n", None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, spoilt: bytes | None) -> None:
    path, cache = write_tar(tmp_path / "a.tar", captioned(range(3))), IndexCache(tmp_path / "cache")
    made = one(cache, path)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x77" if spoilt is None else spoilt)
    assert one(cache, path).rows.tolist() == made.rows.tolist()
    assert file.read_bytes() == whole and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_changed_tar_is_read_anew_and_a_touched_one_has_the_same_digest(tmp_path: Path) -> None:
    path, cache = write_tar(tmp_path / "a.tar", captioned(range(3))), IndexCache(tmp_path / "cache")
    made = one(cache, path)
    os.utime(path, ns=(0, 12345))
    touched = one(cache, path)
    assert touched.digest == made.digest and touched.stamp == (made.stamp[0], 12345)
    write_tar(path, captioned([0, 1, 7]))
    os.utime(path, ns=(0, 67890))
    changed = one(cache, path)
    assert changed.stamp[0] == made.stamp[0] and changed.digest != made.digest
    assert contents(path, changed)[2][0] == picture(7)


def test_a_cache_that_takes_no_files_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    index = one(IndexCache(tmp_path / "cache"), write_tar(tmp_path / "a.tar", captioned(range(3))))
    assert len(index.rows) == 3
    assert "keeping the index of a tar failed" in caplog.text


@pytest.mark.parametrize("first", [0, 1, 4])
def test_processes_begin_at_different_tars_and_have_all_of_them(tmp_path: Path, first: int) -> None:
    paths = [write_tar(tmp_path / f"{place}.tar", captioned([place])) for place in range(4)] + [tmp_path / "none"]
    found = IndexCache(None).load(paths, threads=2, first=first)
    assert [index.path for index in found if isinstance(index, TarIndex)] == paths[:4]
    assert isinstance(found[4], FileNotFoundError)


def test_how_far_it_is(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{place}.tar", captioned([place])) for place in range(3)]
    told: list[str] = []
    IndexCache(None).load(paths, threads=1, first=1, tell=told.append, every=0.0)
    assert told == [
        f"reading the headers of tars: {count} of 3, now {path}" for count, path in enumerate((*paths[1:], paths[0]), 1)
    ]
    IndexCache(None).load(paths, threads=1, tell=told.append)
    assert len(told) == 3


def test_few_files_are_open_at_once_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    paths = [tmp_path / str(place) for place in range(5)]
    for place, path in enumerate(paths):
        path.write_bytes(b"%d" % place)
    files = OpenFiles(limit=2)
    descriptors = Path("/proc/self/fd")
    for path in paths * 2:
        with files.reading(path, stamp_of(path.stat())) as reader, files.reading(paths[0], stamp_of(paths[0].stat())):
            assert reader.at(0, 9) == path.name.encode()
        if descriptors.is_dir():
            held = [os.readlink(file) for file in descriptors.iterdir() if file.is_symlink() and file.exists()]
            assert len([name for name in held if Path(name).parent == tmp_path]) <= 2
    files.close()
    stamp = stamp_of(paths[1].stat())
    paths[1].write_bytes(b"other")
    with pytest.raises(DataError, match="1: changed since the run began"), files.reading(paths[1], stamp):
        pass
    paths[2].unlink()
    with pytest.raises(DataError, match="2: cannot be read"), files.reading(paths[2], stamp):
        pass
