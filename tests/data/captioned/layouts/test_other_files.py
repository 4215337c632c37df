"""What lies in a folder of pictures and is of something else, and what is given twice: told, and nothing replaced."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import BadSample, ImageSet
from glm_training.data.problems import DataError
from tests.data.captioned.building import captioned, picture, write_tar

PAIRS = {"a.png": picture(1), "a.txt": "a dot", "b.png": picture(2), "b.txt": "two dots"}
ALONE = {"a.png": picture(1), "b.png": picture(2)}
TABLE = '{"file_name": "a.png", "text": "A"}\n{"file_name": "b.png", "text": "B"}\n'


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def opened(path: Path, *, captions: bool = True, **options: object) -> ImageSet:
    return open_sets([SetOptions(path, **options)], Reading(captions))[0]  # type: ignore[arg-type]


def captions(found: ImageSet) -> list[str | None]:
    return [found.read(row).caption for row in range(len(found))]


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "embedding": [0.5, 0.25]}), path)


OTHERS: dict[str, tuple[str, str | Callable[[Path], object], str]] = {
    "ratings": ("ratings.csv", "image,score\na.png,1\n", "has no column with captions; it has image, score"),
    "a README": ("README.txt", "image, text\nThese are my dots\n", "line 2: has 1 fields and the header 2"),
    "a table of elsewhere": ("log.csv", "image,text\nx.png,1\n", "line 2: {at}/x.png is not there"),
    "JSON lines of elsewhere": ("log.jsonl", '{"prompt": "x", "image": "x.png"}\n', "line 1: {at}/x.png is not there"),
    "a JSON list of scores": ("r.json", '[{"image": "a.png", "score": 1}]', "record 0: has no 'annotation'"),
    "a JSON list without pictures": ("r.json", '[{"id": 1}]', "its records have no key 'image'"),
    "a tar of code": ("old.tar", lambda at: write_tar(at, {"x.py": b"1"}), "it is a tar among pictures"),
    "a tar of pictures": ("old.tar", lambda at: write_tar(at, captioned([7])), "it is a tar among pictures"),
    "parquet without pictures": ("x.parquet", parquet, "has no column with pictures nor captions"),
}


@pytest.mark.parametrize("below", ["", "deep/"])
@pytest.mark.parametrize("name", OTHERS)
def test_pictures_with_captions_stay_what_they_are(tmp_path: Path, name: str, below: str) -> None:
    file, content, why = OTHERS[name]
    put(tmp_path, {below + name: data for name, data in PAIRS.items()})
    if isinstance(content, str):
        put(tmp_path, {file: content})
    else:
        content(tmp_path / file)
    found = opened(tmp_path)
    assert captions(found) == ["a dot", "two dots"] and found.faults == []
    assert len(found.remarks) == 1
    assert found.remarks[0].startswith(f"{tmp_path}: {file} is not read: {why.format(at=tmp_path)}")


def test_a_table_that_names_the_pictures_wins_over_captions_beside_them(tmp_path: Path) -> None:
    found = opened(put(tmp_path, PAIRS | {"metadata.jsonl": TABLE}))
    assert captions(found) == ["A", "B"] and found.remarks == []


def test_a_readme_beside_a_table_is_told_and_not_read(tmp_path: Path) -> None:
    found = opened(put(tmp_path, ALONE | {"metadata.jsonl": TABLE, "README.txt": "image, text\nMy dots\n"}))
    assert captions(found) == ["A", "B"] and found.faults == []
    assert [remark.split(": ")[1] for remark in found.remarks] == ["README.txt is not read"]


def test_of_two_tables_one_that_names_nothing_is_at_fault(tmp_path: Path) -> None:
    """It is named like one, and nothing else says what its pictures are."""
    found = opened(put(tmp_path, ALONE | {"metadata.jsonl": TABLE, "more.csv": "image,text\nx.png,X\n"}))
    assert captions(found) == ["A", "B"]
    assert [(fault.path.name, fault.key) for fault in found.faults] == [("more.csv", "line 2")]


def test_pictures_without_captions_are_not_taken_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata.jsonl: line 1: .*x.png is not there"):
        opened(put(tmp_path, ALONE | {"metadata.jsonl": '{"file_name": "x.png", "text": "A"}\n'}))


def test_where_no_captions_are_needed_pictures_stand_alone(tmp_path: Path) -> None:
    put(tmp_path, ALONE | {"README.txt": "image, text\nMy dots\n"})
    found = opened(tmp_path, captions=False)
    assert len(found) == 2 and len(found.remarks) == 1


def test_tars_beside_a_stray_picture_are_not_passed_over(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", captioned([number]))
    with pytest.raises(DataError, match="is a picture among tars"):
        opened(put(tmp_path, {"a.png": picture(1), "a.txt": "a dot"}))


TWICE: dict[str, tuple[str, str, list[tuple[str, str]], list[str]]] = {
    "a name": (
        "x.json",
        '{"a.png": "x", "b.png": "two dots", "a.png": "y"}',
        [
            ("record 0", "'a.png' is named by record 2, too"),
            ("record 2", "'a.png' is named by record 0, too"),
        ],
        ["two dots"],
    ),
    "a name of records": (
        "x.json",
        '{"a.png": {"caption": "x"}, "a.png": {"caption": "x"}, "b.png": {"caption": "two dots"}}',
        [
            ("record 0", "'a.png' is named by record 1, too"),
            ("record 1", "'a.png' is named by record 0, too"),
        ],
        ["two dots"],
    ),
    "a key of a line": (
        "x.jsonl",
        '{"image": "a.png", "text": "x", "text": "y"}\n{"image": "b.png", "text": "two dots"}\n',
        [("line 1", "gives 'text' twice")],
        ["two dots"],
    ),
    "a key of a record": (
        "x.json",
        '[{"image": "b.png", "text": "two dots"}, {"image": "a.png", "image": "b.png", "text": "x"}]',
        [("record 1", "gives 'image' twice")],
        ["two dots"],
    ),
    "a key of a listing": (
        "x.json",
        '[{"image": "a.png", "image": "b.png", "annotation": "b.note"}, {"image": "b.png", "annotation": "b.note"}]',
        [("record 0", "gives 'image' twice")],
        ["two dots"],
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_json_gives_twice_is_told(tmp_path: Path, name: str) -> None:
    file, text, faults, left = TWICE[name]
    found = opened(put(tmp_path, ALONE | {file: text, "b.note": "two dots"}) / file)
    assert [(fault.key, fault.reason) for fault in found.faults] == faults
    assert captions(found) == left


def test_a_caption_that_is_given_twice_is_told(tmp_path: Path) -> None:
    put(
        tmp_path,
        ALONE | {"a.json": '{"caption": "x", "caption": "y"}', "b.json": '{"seed": 1, "seed": 2, "caption": "B"}'},
    )
    found = opened(tmp_path)
    with pytest.raises(BadSample, match="its annotation gives 'caption' twice"):
        found.read(0)
    assert found.read(1).caption == "B"  # nothing of it is read but the caption


def test_several_captions_of_a_picture_are_samples_of_their_own(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "text": text} for text in ("a dot", "a red dot")]
    found = opened(put(tmp_path, ALONE | {"metadata.jsonl": "\n".join(map(json.dumps, lines))}))
    assert captions(found) == ["a dot", "a red dot"] and found.faults == []


CAFE = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
SPELLED = {
    "a suffix in two cases": ("a.JPEG", "a.Txt"),
    "a whole name and a suffix in two cases": ("a.png", "a.png.Txt"),
    "a picture of a Mac": (f"{CAFE['NFD']}.png", f"{CAFE['NFC']}.txt"),
    "a caption of a Mac": (f"{CAFE['NFC']}.png", f"{CAFE['NFD']}.TXT"),
}


@pytest.mark.parametrize("name", SPELLED)
def test_captions_are_found_however_they_are_spelled(tmp_path: Path, name: str) -> None:
    image, text = SPELLED[name]
    put(tmp_path, {image: picture(1), text: "a dot", "b.png": picture(2), "b.txt": "two dots"})
    found = opened(tmp_path)
    assert sorted(filter(None, captions(found))) == ["a dot", "two dots"]
    assert found.remarks == [] and found.faults == []
    before = found.digests()
    put(tmp_path, {text: "a cat"})
    assert opened(tmp_path).digests() != before  # a resume knows that it changed


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["table", "listing"])
def test_tables_name_files_in_either_form(tmp_path: Path, kind: str, form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    record = {"image": f"{CAFE[form]}.png", "text": "a dot", "annotation": f"{CAFE[form]}.note"}
    record.pop("annotation" if kind == "table" else "text")
    files = {f"{CAFE[other]}.png": picture(1), f"{CAFE[other]}.note": "a dot"}
    found = opened(put(tmp_path, files | {"x.json": json.dumps([record], ensure_ascii=False)}) / "x.json")
    assert captions(found) == ["a dot"] and found.read(0).image == picture(1) and found.faults == []


@pytest.mark.parametrize("table", [False, True])
def test_a_snapshot_in_a_hubs_cache_is_read_through_its_links(tmp_path: Path, table: bool) -> None:
    put(tmp_path, {"repo/blobs/1": picture(1), "repo/blobs/2": "a dot", "secret": picture(2)})
    snapshot = tmp_path / "repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name, target in {"a.png": "../../blobs/1", "a.txt": "../../blobs/2", "b.png": "../../../secret"}.items():
        (snapshot / name).symlink_to(target)
    (snapshot / "b.txt").symlink_to("../../blobs/2")
    if table:
        put(snapshot, {"x.csv": "image,text\na.png,a dot\nb.png,a dot\n"})
    found = opened(snapshot)
    assert found.read(0).image == picture(1) and found.read(0).caption == "a dot"
    with pytest.raises(BadSample, match=f"leads out of {tmp_path / 'repo'}"):
        found.read(1)


def test_a_workflow_beside_a_picture_is_no_caption(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": picture(1), "a.json": '{"nodes": [], "prompt": {"3": {}}}'})
    with pytest.raises(BadSample, match="has no key 'caption', nor any text. Write the caption into a .txt beside it"):
        opened(tmp_path).read(0)
    with_trigger = open_sets([SetOptions(tmp_path)], Reading(True, optional=True))[0]
    assert captions(with_trigger) == [""]
    put(tmp_path, {"a.json": '{"nodes": [], "prompt": "a dot"}'})  # one that lies under another key is not lost
    with pytest.raises(BadSample, match=r"no key 'caption' \(texts: prompt\). Set cap_source"):
        with_trigger.read(0)


def test_captions_in_a_folder_of_their_own_are_pointed_to(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"images/a.png": picture(1), "captions/a.txt": "a dot", "captions/b.txt": "b", "images/b.png": picture(2)},
    )
    with pytest.raises(
        DataError, match=r"none of its pictures has a caption, and 2 texts no picture \(captions/a.txt\)"
    ):
        opened(tmp_path)


def test_repeats_in_the_names_of_folders_are_told(tmp_path: Path) -> None:
    names = ("10_dog", "03_cat", "1_fish", "2024_01", "7up")
    put(tmp_path, {f"{name}/{file}": data for name in names for file, data in PAIRS.items()})
    found = opened(tmp_path)
    assert len(found) == 2 * len(names)
    assert found.remarks == [
        f"{tmp_path}: each picture counts once, whatever number a folder's name begins with; to have some more often: "
        f"data.images: [{{path: {tmp_path}/03_cat, repeats: 3}}, {{path: {tmp_path}/10_dog, repeats: 10}}]"
    ]
    assert len(opened(tmp_path / "10_dog").remarks) == 1
    assert opened(tmp_path / "10_dog", repeats=10).remarks == []
