"""What a path is, told by its content: read, or refused with how it begins and the nearest layout."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import BadSample, ImageSet
from glm_training.data.problems import DataError
from tests.data.captioned.building import captioned, opened, picture, tars, write_listing, write_tar


def told(found: ImageSet) -> list[tuple[str | None, bytes]]:
    """Caption and picture of each row."""
    samples = [found.read(row) for row in range(len(found))]
    return [(sample.caption, sample.image) for sample in samples]


def numbers(*chosen: int, text: str | None = "picture") -> list[tuple[str | None, bytes]]:
    return [(None if text is None else f"{text} {number}", picture(number)) for number in chosen]


def put(folder: Path, **files: bytes | str) -> Path:
    """Files in `folder`; `a__b_txt` is a/b.txt."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


# -- understood --------------------------------------------------------------------------------------------------------


def test_tars(tmp_path: Path) -> None:
    folder = tars(tmp_path / "set", (2, 1))
    (folder / "deeper").mkdir()
    write_tar(folder / "deeper" / "named_otherwise", captioned([9]))
    put(folder, sizes_json='{"000.tar": 2}')
    found = opened(folder)
    assert told(found) == numbers(0, 1, 2, 9) and found.faults == []
    assert found.remarks == [f"{folder}: 1 file beside the tars not read (sizes.json)"]
    assert [found.where(row) for row in (1, 2)] == [(folder / "000.tar", "0001"), (folder / "001.tar", "0002")]
    assert told(opened(folder / "001.tar")) == numbers(2)
    assert set(found.digests()) == {str(folder / name) for name in ("000.tar", "001.tar", "deeper/named_otherwise")}


def test_tars_of_imagenet(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a/n0.jpg": picture(1), "a/n0.cls": b"7", "a/n1.png": picture(2), "a/n1.cls": b"8"})
    assert told(opened(tmp_path / "a.tar", captions=False)) == numbers(1, 2, text=None)
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "a.tar")
    assert "none of 2 pictures has a caption (a .txt or .json of its name)" in str(caught.value)
    assert "a/n0.jpg, a/n0.cls" in str(caught.value) and "autoencoder" in str(caught.value)


def test_bytes_of_a_sample_in_memory(tmp_path: Path) -> None:
    found = [opened(tars(tmp_path / "set"), captions=captions) for captions in (True, False)]
    assert [one._rows.nbytes / len(one) for one in found] == [17, 8]  # type: ignore[attr-defined]


def test_which_caption_of_two_counts(tmp_path: Path) -> None:
    both = {"0.png": picture(0), "0.txt": b"text", "0.json": b'{"caption": "plain", "re_caption": "again"}'}
    alone = {"1.json": b'{"caption": "alone", "re_caption": "anew"}', "1.png": picture(1)}
    path = write_tar(tmp_path / "a.tar", both | alone)
    assert [caption for caption, _ in told(opened(path))] == ["text", "alone"]
    assert [caption for caption, _ in told(opened(path, cap_source="re_caption"))] == ["again", "anew"]
    folder = put(tmp_path / "folder", **{name.replace(".", "_"): data for name, data in (both | alone).items()})
    assert [caption for caption, _ in told(opened(folder))] == ["text", "alone"]
    assert [caption for caption, _ in told(opened(folder, cap_source="re_caption"))] == ["again", "anew"]


def test_listings(tmp_path: Path) -> None:
    path = write_listing(tmp_path / "set", 3)
    found = opened(path)
    assert told(found) == numbers(0, 1, 2)
    assert found.where(1) == (path, "record 1 (images/1.png)")
    assert [caption for caption, _ in told(opened(path, cap_source="re_caption"))] == ["again 0", "again 1", "again 2"]
    assert told(opened(path, captions=False)) == numbers(0, 1, 2, text=None)
    assert list(found.digests()) == [str(path)]
    os.rename(path, tmp_path / "set" / "named_otherwise.txt")
    assert told(opened(tmp_path / "set" / "named_otherwise.txt")) == numbers(0, 1, 2)


def test_a_folder_of_listings_and_texts_as_annotations(tmp_path: Path) -> None:
    put(
        tmp_path / "files",
        a_png=picture(1),
        b_png=picture(2),
        a_txt="one  line\n",
        b_note="{not JSON",
        b_x='{"caption": 7}',
    )
    records = [
        {"image": "a.png", "annotation": "a.txt"},
        {"image": str(tmp_path / "files/b.png"), "annotation": "a.txt"},
    ]
    put(tmp_path / "lists", **{f"{name}_json": json.dumps([one]) for name, one in zip("xy", records, strict=True)})
    found = opened(tmp_path / "lists", root=tmp_path / "files")
    assert told(found) == [("one line", picture(1)), ("one line", picture(2))]


def test_folders(tmp_path: Path) -> None:
    put(
        tmp_path / "set",
        b_png=picture(1), b_txt="\ufeffpicture 1\r\n", a_JPG=picture(2, kind="JPEG"), a_caption="two\nlines",
        deep__er__c_webp=picture(3, kind="WEBP"), deep__er__c_json='{"caption": "picture 3"}',
        noending=picture(4), noending_txt="picture 4", _hidden__x_png=picture(5), notes_txt="of no picture",
    )  # fmt: skip
    found = opened(tmp_path / "set")
    captions = [caption for caption, _ in told(found)]
    assert captions == ["two lines", "picture 1", "picture 4", "picture 3"] and found.faults == []
    assert found.remarks == [f"{tmp_path / 'set'}: 1 text without a picture (notes.txt)"]
    assert found.where(3) == (tmp_path / "set/deep/er/c.webp", "")
    assert len(opened(tmp_path / "set", captions=False)) == 4
    assert set(found.digests()) == {str(tmp_path / "set"), str(tmp_path / "set/deep/er")}


@pytest.mark.parametrize("odd", ["[V] dog on a table", '["a", "list"]', '[{"caption": "of records"}]', "[]"])
def test_captions_that_begin_with_a_bracket_are_no_listing(tmp_path: Path, odd: str) -> None:
    files = dict(a_png=picture(1), a_txt="picture 1", b_PNG=picture(2), notes_txt="[V] cat, of no picture")
    found = opened(put(tmp_path / "texts", **files, b_txt=odd))
    assert [caption for caption, _ in told(found)] == ["picture 1", odd]
    found = opened(put(tmp_path / "jsons", **files, b_json=odd))
    assert found.read(0).caption == "picture 1"
    with pytest.raises(BadSample, match="its annotation is"):
        found.read(1)


def test_lists_that_are_no_listing_beside_one(tmp_path: Path) -> None:
    folder = write_listing(tmp_path / "set", 3).parent
    put(folder, images__1_txt="[V] dog", notes__2_json='[{"caption": "of a list"}]')
    found = opened(folder, root=folder)
    assert [found.read(row).caption for row in (0, 1)] == ["picture 0", "picture 1"] and len(found) == 3
    (fault,) = found.faults
    assert fault.path == folder / "notes/2.json" and "no key 'image' (the first one has: caption)" in fault.reason
    with pytest.raises(BadSample) as caught:
        found.read(2)
    assert (caught.value.fault.path, caught.value.fault.key) == (fault.path, fault.key)  # counted once


@pytest.mark.parametrize("kind", ["tars", "pictures", "listing"])
def test_a_readme_does_not_hide_the_folders_below(tmp_path: Path, kind: str) -> None:
    below = tmp_path / "set" / "train"
    if kind == "tars":
        tars(below, (2,))
    elif kind == "pictures":
        put(below, a_png=picture(0), a_txt="picture 0", b_png=picture(1), b_txt="picture 1")
    else:
        write_listing(below, 2)
    put(tmp_path / "set", README_md="# A set", LICENSE="free", a__notes_txt="of nobody")
    assert told(opened(tmp_path / "set")) == numbers(0, 1)


def test_upper_case_suffixes_of_captions(tmp_path: Path) -> None:
    both = dict(c_png=picture(3), c_TXT="in vain", c_txt="picture 3", c_json='{"caption": "in JSON"}')
    put(tmp_path, a_PNG=picture(1), a_TXT="picture 1", b_JPG=picture(2), b_JSON='{"caption": "picture 2"}', **both)
    found = opened(tmp_path)
    assert [caption for caption, _ in told(found)] == ["picture 1", "picture 2", "picture 3"]
    assert found.faults == []  # a second caption of a picture is of a picture, too
    assert found.remarks == [f"{tmp_path}: 1 picture with two captions; c.txt counts, not c.TXT"]
    assert found.digests() != opened(put(tmp_path, a_TXT="picture 9")).digests()
    assert opened(tmp_path, cap_source="caption").read(2).caption == "in JSON"


def test_a_link_back_is_not_walked_for_ever(tmp_path: Path) -> None:
    put(tmp_path / "set", a_png=picture(1), a_txt="picture 1")
    (tmp_path / "set" / "back").symlink_to(tmp_path / "set")
    assert told(opened(tmp_path / "set")) == numbers(1)


# -- what changes is noticed -------------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[Path], object]] = {
    "001.tar": lambda at: write_tar(at / "001.tar", captioned([2, 5])),
    "data.json": lambda at: (at / "images/1.png").write_bytes(picture(1, (91, 91))),
    "data.json, a caption of the same length": lambda at: (at / "notes/0.json").write_text(
        (at / "notes/0.json").read_text(encoding="utf-8").replace("again 0", "again 9"), encoding="utf-8"
    ),
    "sub": lambda at: (at / "sub/b.png").write_bytes(picture(1, (91, 91))),
    "sub, a caption of the same length": lambda at: (at / "sub/b.txt").write_text("six", encoding="utf-8"),
    "sub, a picture more": lambda at: put(at / "sub", c_png=picture(3), c_txt="three"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digests_follow_the_content_and_name_the_place(tmp_path: Path, change: str) -> None:
    root, changed = tmp_path / "set", change.partition(",")[0]
    if changed == "001.tar":
        path = tars(root, (2, 2))
    elif changed == "data.json":
        path = write_listing(root, 2)
    else:
        path = put(root, a_png=picture(1), a_txt="one", sub__b_png=picture(2), sub__b_txt="two")
    before = opened(path).digests()
    assert opened(path).digests() == before
    CHANGES[change](root)
    after = opened(path).digests()
    assert [name for name in before if before[name] != after[name]] == [str(root / changed)]
    moved = tmp_path / "moved"
    root.rename(moved)
    assert list(opened(moved if path == root else moved / path.name).digests().values()) == list(after.values())


# -- refused -----------------------------------------------------------------------------------------------------------

Make = Callable[[Path], Path]
REFUSED: dict[str, tuple[Make, str]] = {
    "nothing there": (lambda at: at / "none", "there is no such file or folder. Correct the path"),
    "braces of webdataset": (lambda at: at / "{000..004}.tar", "Name the folder, it takes all tars in it"),
    "a pattern": (lambda at: at / "*.tar", "Name the folder, it takes all tars in it"),
    "a URL": (lambda at: Path("http://host/a.tar"), "is a URL|URLs are not read"),
    "one picture": (lambda at: put(at, a_png=picture(1)) / "a.png", "is one picture. Name the folder it lies in"),
    "a text of prompts": (
        lambda at: put(at, p_txt="a red dot\na blue dot\n") / "p.txt",
        r"is no set of pictures but a text, which begins a red dot \| a blue dot. The nearest layout: a folder of pict",
    ),
    "an object": (
        lambda at: put(at, p_json='{"image": "a.png"}') / "p.json",
        r"a JSON object, which begins \{\"image\": \"a.png\"\}. The nearest layout: a JSON list of \{\"image\"",
    ),
    "a list without the key": (
        lambda at: put(at, p_json='[{"scan": "a.png", "words": "x"}]') / "p.json",
        r"its records have no key 'image' \(the first one has: scan, words\). Write a JSON list of",
    ),
    "a list of texts": (lambda at: put(at, p_json='["a"]') / "p.json", r"no key 'image' \(the first one has: str\)"),
    "an empty list": (lambda at: put(at, p_json="[]") / "p.json", "lists no picture"),
    "a list that ends early": (
        lambda at: put(at, p_json='[{"image": "a.png"},\n {"im') / "p.json",
        r"p.json:2: not JSON: .* it begins \[\{\"image\": \"a.png\"\}, \| \{\"im",
    ),
    "a prompt in brackets": (lambda at: put(at, p_txt="[a] dot") / "p.txt", r"not JSON: .* it begins \[a\] dot"),
    "an empty folder": (lambda at: at, "is an empty folder"),
    "a folder of texts": (
        lambda at: put(at, a_txt="a dot", b_md="# title"),
        r"holds no pictures: a.txt \(text\), b.md \(text\); a.txt begins a dot. The nearest layout: a folder of pict",
    ),
    "a compressed tar": (
        lambda at: put(at, a_tar_gz=gzip.compress(b"x")) / "a.tar.gz",
        "a.tar.gz is compressed. Unpack it: a compressed tar has no places to read from",
    ),
    "a tar of nothing": (lambda at: write_tar(at / "a.tar", {}), r"holds no sample \(is empty\). The nearest layout"),
    "a tar of no pictures": (
        lambda at: write_tar(at / "a.tar", {"a.npy": b"x", "a.txt": b"y"}),
        r"holds no sample \(a has no picture, only npy, text\); its first members are a.npy, a.txt. The nearest layout",
    ),
    "pictures among tars": (
        lambda at: put(tars(at), x_png=picture(1)),
        r"x.png: is a picture among tars.*as a set of their own",
    ),
    "pictures without captions": (
        lambda at: put(at, a_png=picture(1), b_png=picture(2)),
        r"none of its pictures has a caption. Add a .txt of the same name beside each",
    ),
    "no file of a list is there": (
        lambda at: put(at, p_json='[{"image": "a.png", "annotation": "a.txt"}]') / "p.json",
        r"none of 1 record can be used.*(.|\n)*record 0: .*a.png is not there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        opened(make(tmp_path))


def test_what_is_wrong_with_several_sets_is_told_together(tmp_path: Path) -> None:
    paths = [tmp_path / "none", tars(tmp_path / "set"), put(tmp_path / "other", a_txt="x")]
    with pytest.raises(DataError) as caught:
        open_sets([SetOptions(path) for path in paths], Reading(True))
    assert [problem.path for problem in caught.value.problems] == [paths[0], paths[2]]


# -- named and counted, the rest is kept -------------------------------------------------------------------------------


def test_broken_tars_lose_nothing_but_what_is_broken(tmp_path: Path) -> None:
    folder = tars(tmp_path / "set", (5, 4, 3))
    (folder / "003.tar").write_bytes(b"")  # nothing
    write_tar(folder / "004.tar", {})  # an end mark alone
    (folder / "005.tar").write_bytes(b"not a tar at all")
    (folder / "006.tar.gz").write_bytes(gzip.compress(b"x"))
    data = bytearray((folder / "000.tar").read_bytes())
    data[data.index(b"0002.png") + 1] = ord("x")  # the checksum is another one now
    (folder / "000.tar").write_bytes(bytes(data))
    data = bytearray((folder / "001.tar").read_bytes())
    (folder / "001.tar").write_bytes(bytes(data[: data.index(b"0008.png") + 600]))  # 8 is the last of its tar
    write_tar(folder / "002.tar", captioned([9, 10, 11]) | {"0010.txt": b"picture 10"})
    found = opened(folder)
    assert told(found) == numbers(0, 1, 3, 4, 5, 6, 7, 9, 10, 11)
    named = [(fault.path.name, fault.key, fault.reason) for fault in found.faults]
    assert len(named) == 7
    assert ("001.tar", "0008", "the tar ends inside 0008.png") in named
    assert ("000.tar", "0002", "has no picture, only text") in named
    assert [reason for name, key, reason in named if name == "000.tar" and key.startswith("bytes")] == [
        "a damaged header: what lies there is lost"
    ]
    assert {(name, reason) for name, _, reason in named[:4] if name >= "003"} == {
        ("003.tar", "is empty"), ("005.tar", "is no tar (text)"), ("006.tar.gz", "is no tar (gzip-compressed)")
    }  # fmt: skip
    assert ("004.tar", "", "is empty") in named


def test_samples_of_tars_without_captions(tmp_path: Path) -> None:
    members = captioned(range(3)) | {"0003.png": picture(3), "0004.png": picture(4), "0004.cls": b"1"}
    found = opened(write_tar(tmp_path / "a.tar", members))
    assert told(found) == numbers(0, 1, 2)
    assert [(fault.key, fault.reason) for fault in found.faults] == [
        ("0003", "has no caption"), ("0004", "has no caption")
    ]  # fmt: skip
    assert len(opened(tmp_path / "a.tar", captions=False)) == 5


def test_missing_files_of_a_listing(tmp_path: Path) -> None:
    path = write_listing(tmp_path / "set", 6)
    (tmp_path / "set/notes/1.json").unlink()
    (tmp_path / "set/images/2.png").unlink()
    (tmp_path / "secret.txt").write_text("not yours", encoding="utf-8")
    records = json.loads(path.read_text(encoding="utf-8"))
    records[3]["annotation"] = "../secret.txt"
    records[4] = {"image": "images/4.png"}
    records += ["text", {"image": "http://host/a.png", "annotation": "notes/0.json"}]
    path.write_text(json.dumps(records), encoding="utf-8")
    found = opened(path)
    assert told(found) == numbers(0, 5)
    assert {(fault.key, fault.reason.replace(str(tmp_path), "")) for fault in found.faults} == {
        ("record 1", "/set/notes/1.json is not there (No such file or directory)"),
        ("record 2", "/set/images/2.png is not there (No such file or directory)"),
        ("record 3", "../secret.txt does not lie below /set, where its paths start"),
        ("record 4", "has no 'annotation'"),
        ("record 6", "is no object but str"),
        ("record 7", "http://host/a.png is a URL, and URLs are not read"),
    }
    assert all(fault.path == path for fault in found.faults)


def test_links_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours", encoding="utf-8")
    put(tmp_path / "set", a_png=picture(1), b_png=picture(2), b_txt="two")
    (tmp_path / "set/a.txt").symlink_to(tmp_path / "secret")
    found = opened(tmp_path / "set")
    with pytest.raises(BadSample, match="a.txt: leads out of"):
        found.read(0)
    assert found.read(1).caption == "two"


def test_pictures_of_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    put(tmp_path / "set", a_png=picture(1), b_png=picture(2), b_txt="two", c_heic=heic, c_txt="of a picture")
    (tmp_path / "set/d.png").symlink_to(tmp_path / "gone")
    found = opened(tmp_path / "set")
    assert [caption for caption, _ in told(found)] == ["two"]
    assert {(fault.path.name, fault.reason) for fault in found.faults} == {
        ("a.png", "has no caption"),
        ("c.heic", "is of a kind that is not read (HEIC, AVIF or JPEG XL)"),
        ("d.png", "cannot be read: No such file or directory"),
    } and found.remarks == []  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (b"", "its caption is empty"),
        (b" \n\t ", "its caption is empty"),
        (b"\xff\xfe", "its caption is not UTF-8"),
        (b'""', "quotation marks"),
        (b"a\x00b", "control character U\\+0000"),
    ],
)
def test_captions_that_are_none(tmp_path: Path, caption: bytes, message: str) -> None:
    found = opened(write_tar(tmp_path / "a.tar", captioned([0]) | {"1.png": picture(1), "1.txt": caption}))
    with pytest.raises(BadSample, match=rf"a\.tar: 1: .*{message}"):
        found.read(1)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("not JSON", "its annotation is not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"prompt": "x", "n": 1}', r"no key 'caption' \(texts: prompt\). Set cap_source"),
        ('{"caption": ["x"]}', "no text under 'caption'"),
    ],
)
def test_annotations_that_are_none(tmp_path: Path, annotation: str, message: str) -> None:
    path = write_listing(tmp_path / "set", 1)
    (tmp_path / "set/notes/0.json").write_text(annotation, encoding="utf-8")
    with pytest.raises(BadSample, match=message):
        opened(path).read(0)
