"""Tables of pictures and captions as people have them, each read or refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import ImageSet
from glm_training.data.problems import DataError
from tests.data.captioned.building import picture, write_tar

Files = dict[str, str | bytes]


def put(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


PAIR: Files = {"a.png": picture(1), "b.png": picture(2)}
TOLD = [("a dot", picture(1), None), ("two dots", picture(2), None)]
EDITS: Files = {"a.png": picture(1), "b.png": picture(2), "from/a.png": picture(3), "from/b.png": picture(4)}
EDITED = [("a dot", picture(1), picture(3)), ("two dots", picture(2), picture(4))]


def saved(folder: Path, rows: dict[str, list[object]], features: dict[str, str], *, as_dict: bool = False) -> None:
    """A dataset of `rows` as save_to_disk writes it; `features`: columns that are images."""
    datasets = pytest.importorskip("datasets")  # an extra, which the suite's own has
    table = datasets.Dataset.from_dict(rows)
    for name in features:
        table = table.cast_column(name, datasets.Image(decode=False))
    (datasets.DatasetDict({"train": table, "test": table.select([0])}) if as_dict else table).save_to_disk(folder)


def parquet(path: Path, rows: dict[str, list[object]]) -> None:
    datasets = pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows).to_parquet(path)


def made(**rows: list[object]) -> dict[str, list[object]]:
    return rows


BYTES = made(
    image=[{"bytes": picture(1), "path": None}, {"bytes": picture(2), "path": None}], text=["a dot", "two dots"]
)
NAMED = made(file_name=["a.png", "b.png"], text=["a dot", "two dots"])

Make = Callable[[Path], object]
UNDERSTOOD: dict[str, tuple[Make, dict[str, object]]] = {
    "metadata.jsonl of an imagefolder": (
        lambda at: put(at, PAIR | {"metadata.jsonl": lines(
            {"file_name": "a.png", "text": "a dot"}, {"file_name": "b.png", "text": "two dots"}
        )}), {},
    ),
    "prompt and image, among captions of other pictures": (
        lambda at: put(at, PAIR | {"list.txt": "\n" + lines({"image": "./a.png", "prompt": "a dot"}) + "\n \n" + lines(
            {"image": "b.png", "prompt": "two  dots\n"}
        ) + "\n"}), {},
    ),
    "a JSON list in metadata.json, of many pictures": (
        lambda at: put(at, PAIR | {f"c{number}.png": picture(9) for number in range(200)} | {
            "metadata.json": json.dumps(
                [{"image": "a.png", "caption": "a dot"}, {"image": "b.png", "caption": "two dots"}], indent=1
            )
        }), {},
    ),
    "CSV": (lambda at: put(at, PAIR | {"metadata.csv": "file_name,text\r\na.png,a dot\r\nb.png,two dots\r\n"}), {}),
    "CSV of a spreadsheet: semicolons, a mark, capitals": (
        lambda at: put(at, PAIR | {"list.csv": '\ufeffImage;Caption;Note\na.png;"a\ndot";x\nb.png;two dots;\n\n'}), {},
    ),
    "a table with tabs": (
        lambda at: put(at, PAIR | {"list": "prompt\tfile_name\na dot\ta.png\ntwo dots\tb.png\n"}), {},
    ),
    "in a folder below, beside a README": (
        lambda at: put(at, {"README.md": "# mine", "train/a.png": picture(1), "train/b.png": picture(2),
                            "train/metadata.csv": "file_name,text\na.png,a dot\nb.png,two dots"}), {},
    ),
    "another column, by name": (
        lambda at: put(at, PAIR | {"x.csv": "image,caption,long\na.png,1,a dot\nb.png,2,two dots"}),
        {"cap_source": "long"},
    ),
    "several captions of a picture: the first": (
        lambda at: put(at, PAIR | {"x.jsonl": lines({"image": "a.png", "captions": ["a dot", "other"]},
                                                    {"image": "b.png", "captions": ["two dots"]})}), {},
    ),
    "captions by picture": (
        lambda at: put(at, PAIR | {"captions.json": json.dumps({"a.png": "a dot", "b.png": "two dots"})}), {},
    ),
    "records by picture": (
        lambda at: put(at, PAIR | {"meta.json": json.dumps(
            {"a.png": {"tags": "x", "caption": "a dot"}, "./b.png": {"tags": "y", "caption": "two dots"}}, indent=1
        )}), {},
    ),
    "edits, for text to image": (
        lambda at: put(at, EDITS | {"x.jsonl": lines(
            {"source": "from/a.png", "target": "a.png", "prompt": "a dot"},
            {"source": "from/b.png", "target": "b.png", "prompt": "two dots"},
        )}), {},
    ),
    "prompts.txt and numbered pictures": (
        lambda at: put(at, {"prompts.txt": "a dot\ntwo dots\n", "target_images/0.png": picture(1),
                            "target_images/1.png": picture(2), "source_images/0.png": picture(3)}), {},
    ),
    "a folder with what systems leave behind": (
        lambda at: put(at, {"A.PNG": picture(1), "A.TXT": "a dot", "b.jpg": picture(2), "b.txt": "two dots",
                            ".DS_Store": "x", "._b.jpg": "x", "__MACOSX/b.jpg": "x", ".hidden/c.png": picture(9)}), {},
    ),
    "captions named after the whole file": (
        lambda at: put(at, {"a.png": picture(1), "a.png.txt": "a dot", "b.jpg": picture(2), "b.jpg.json": '{"caption": '
                            '"two dots"}'}), {},
    ),
    "a folder in folders, with a link": (
        lambda at: (put(at, {"deep/er/a.png": picture(1), "deep/er/a.txt": "a dot", "z/b.png": picture(2)}),
                    (at / "z/b.txt").symlink_to("../texts/two"), put(at, {"texts/two": "two dots"})), {},
    ),
    "a picture in each tar": (
        lambda at: [write_tar(at / f"{n}.tar", {f"{n}.png": picture(n), f"{n}.txt": text.encode()})
                    for n, text in ((1, "a dot"), (2, "two dots"))], {},
    ),
    "parquet with pictures inside": (lambda at: parquet(at / "data/train-00000-of-00001.parquet", BYTES), {}),
    "parquet that names pictures": (lambda at: (put(at, PAIR), parquet(at / "metadata.parquet", NAMED)), {}),
    "parquet of one split among others": (
        lambda at: (parquet(at / "data/train.parquet", BYTES), parquet(at / "data/test.parquet", NAMED)), {},
    ),
    "a dataset on disk": (lambda at: saved(at, BYTES, {"image": ""}), {}),
    "a dataset on disk with splits": (lambda at: saved(at, BYTES, {"image": ""}, as_dict=True), {}),
}  # fmt: skip


def read(found: ImageSet) -> list[tuple[str | None, bytes, bytes | None]]:
    rows = [found.read(row) for row in range(len(found))]
    return [(row.caption, row.image, row.source) for row in rows]


def opened(path: Path, *, sources: bool = False, **options: object) -> ImageSet:
    return open_sets([SetOptions(path, **options)], Reading(True, sources=sources))[0]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted parquet files lie in a folder of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(tmp_path: Path, name: str) -> None:
    make, options = UNDERSTOOD[name]
    make(tmp_path)
    found = opened(tmp_path, **options)
    assert read(found) == TOLD and found.faults == []
    assert found.digests() == opened(tmp_path, **options).digests() != {}


def test_a_file_of_prompts_stands_for_its_folder(tmp_path: Path) -> None:
    make, _ = UNDERSTOOD["prompts.txt and numbered pictures"]
    make(tmp_path)
    found = opened(tmp_path / "prompts.txt")
    assert read(found) == TOLD and found.where(1) == (tmp_path / "prompts.txt", "line 2 (1.png)")


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("kind", ["prompts", "csv", "jsonl"])
def test_characters_of_several_bytes_may_lie_anywhere(tmp_path: Path, kind: str, shift: int) -> None:
    """A file is looked at up to a fixed byte, which may lie inside a character; short ones end in one."""
    texts = ["a" * shift + "一只猫坐在窗边" * 40, "a" * shift + "é😀"]
    table = {"a.png": picture(1), "b.png": picture(2)}
    records = list(zip(table, texts, strict=True))
    put(
        tmp_path,
        {
            "prompts": {"prompts.txt": "\n".join(texts), "target_images/0.png": picture(1),
                        "target_images/1.png": picture(2)},
            "csv": table | {"x.csv": "\n".join(["file_name,text", *map(",".join, records)])},
            "jsonl": table | {"x.jsonl": "\n".join(
                json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in records)},
        }[kind],
    )  # fmt: skip
    assert read(opened(tmp_path)) == [(texts[0], picture(1), None), (texts[1], picture(2), None)]


EDITING: dict[str, Make] = {
    "source and target": lambda at: put(at, EDITS | {"x.csv": "source,target,prompt\nfrom/a.png,a.png,a dot\n"
                                                              "from/b.png,b.png,two dots"}),
    "image and edited_image": lambda at: put(at, EDITS | {"x.jsonl": lines(
        {"image": "from/a.png", "edit_prompt": "a dot", "edited_image": "a.png"},
        {"image": "from/b.png", "edit_prompt": "two dots", "edited_image": "b.png"},
    )}),
    "columns of file names": lambda at: put(at, EDITS | {"metadata.csv":
        "input_image_file_name,edited_image_file_name,text\nfrom/a.png,a.png,a dot\nfrom/b.png,b.png,two dots"}),
    "numbered": lambda at: put(at, {"prompts.txt": "a dot\ntwo dots", "target_images/0.png": picture(1),
        "target_images/1.png": picture(2), "source_images/0.png": picture(3), "source_images/1.png": picture(4)}),
    "parquet": lambda at: parquet(at / "x.parquet", made(
        original_image=[{"bytes": picture(3)}, {"bytes": picture(4)}], edit_prompt=["a dot", "two dots"],
        edited_image=[{"bytes": picture(1)}, {"bytes": picture(2)}])),
}  # fmt: skip


EDITING["tars of edits"] = lambda at: write_tar(at / "a.tar", {
    "0.source.png": picture(3), "0.target.png": picture(1), "0.txt": b"a dot",
    "1.edit_prompt.txt": b"two dots", "1.edited_image.png": picture(2), "1.original_image.png": picture(4),
})  # fmt: skip
EDITING["tars of edits beside the picture itself"] = lambda at: write_tar(at / "a.tar", {
    "0.png": picture(1), "0.source.png": picture(3), "0.target.png": picture(9), "0.txt": b"a dot",
    "1.edited_image.png": picture(8), "1.json": b'{"caption": "two dots"}', "1.png": picture(2),
    "1.source.png": picture(4),
})  # fmt: skip


@pytest.mark.parametrize("name", EDITING)
def test_edits(tmp_path: Path, name: str) -> None:
    EDITING[name](tmp_path)
    assert read(opened(tmp_path, sources=True)) == EDITED
    assert [row[:2] for row in read(opened(tmp_path))] == [row[:2] for row in EDITED]


REFUSED: dict[str, tuple[Files, str]] = {
    "no known column of captions": (
        PAIR | {"labels.csv": "file_name,label\na.png,3"},
        r"none of its pictures has a caption(.|\n)*labels.csv: has no column with captions; it has file_name, label. "
        "Name it prompt or caption or text, or set cap_source to it, as in data.images: ",
    ),
    "a table that is none": (
        PAIR | {"metadata.jsonl": '{"file_name": "a.png", text: "a dot"}'},
        r"none of its pictures has a caption(.|\n)*metadata.jsonl: is no table .* it begins \{\"file_name\": \"a.png\"",
    ),
    "all files missing": (
        {"metadata.jsonl": lines({"file_name": "x.png", "text": "a dot"})},
        r"none of 1 record can be used(.|\n)*metadata.jsonl: line 1: .*x.png is not there",
    ),
    "UTF-16 of a spreadsheet": (
        PAIR | {"list.csv": "file_name,text\na.png,a dot".encode("utf-16")},
        r"list.csv: is no table .* UTF-16. Save it as UTF-8",
    ),
    "not UTF-8": (
        PAIR | {"list.csv": b"file_name,text\n" + b"a.png,a dot\n" * 60 + b"b.png,caf\xe9\n"},
        r"list.csv:62: is not UTF-8. Save it as UTF-8",
    ),
    "URLs": (
        {"x.csv": "image,text\nhttps://host/a.png,a dot"},
        r"line 2: https://host/a.png is a URL, and URLs are not read",
    ),
    "outside of the folder": ({"x.csv": "image,text\n../a.png,a dot"}, r"\.\./a.png does not lie below"),
    "numbers that do not fit": (
        {"prompts.txt": "a dot\ntwo dots", "target_images/0.png": picture(1), "target_images/7.png": picture(2)},
        r"target image has no prompt: .* ends at index 1",
    ),
    "no known column": (
        PAIR | {"list.csv": "foto,words\na.png,a dot"},
        r"list.csv: has no column with pictures nor captions; it has foto, words. Name it image, .*, and the one",
    ),
    "no known column of pictures": (
        {"a.png": picture(1), "list.csv": "foto,text\na.png,a dot"},
        r"list.csv: has no column with pictures; it has foto, text. Name it image, file_name or edited_image\.",
    ),
    "pictures that are not read alone": (
        {f"{name}.HEIC": b"\0\0\0\x18ftypheic" + bytes(40) for name in "abc"} | {"a.txt": "a dot"},
        r"a.HEIC: is of a kind that is not read \(HEIC, AVIF or JPEG XL\); so are 2 more here. Convert it to PNG",
    ),
    "empty files": ({"a.png": b"", "a.txt": b"", "metadata.csv": b""}, "holds no pictures: .*empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    files, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        opened(put(tmp_path, files))


def test_records_at_fault_are_named_and_the_others_kept(tmp_path: Path) -> None:
    put(
        tmp_path,
        PAIR | {"c.png": picture(3), "metadata.csv": "file_name,text\nx.png,gone\na.png,a dot\nb.png\nb.png,\n"},
    )
    found = opened(tmp_path)
    assert read(found) == TOLD[:1]
    assert [(fault.key, fault.reason) for fault in found.faults] == [
        ("line 4", "has 1 fields and the header 2: text with ',' in it stands in double quotes"),
        ("line 2", f"{tmp_path / 'x.png'} is not there (No such file or directory)"),
        ("line 5", "its caption is empty"),
    ][1:2] + [
        ("line 4", "has 1 fields and the header 2: text with ',' in it stands in double quotes"),
        ("line 5", "its caption is empty"),
    ]
    assert found.where(0) == (tmp_path / "metadata.csv", "line 3 (a.png)")


def test_pictures_that_no_record_names_and_columns_beside_are_told(tmp_path: Path) -> None:
    table = "image,caption,text,source\na.png,a dot,x,b.png\n"
    found = opened(put(tmp_path, PAIR | {"c.png": picture(3), "list.csv": table}))
    assert found.remarks == [
        f"{tmp_path / 'list.csv'}: captions are of the column caption; cap_source may name text",
        f"{tmp_path / 'list.csv'}: the pictures of the column source are for training.mode i2i",
        f"{tmp_path}: 2 pictures that no record names (b.png, c.png)",
    ]


def test_of_two_captions_one_counts_and_that_is_told(tmp_path: Path) -> None:
    put(tmp_path, PAIR | {"a.txt": "a dot", "a.json": '{"caption": "other"}', "b.png.txt": "x", "b.txt": "two dots"})
    found = opened(tmp_path)
    assert read(found) == TOLD
    assert found.remarks == [f"{tmp_path}: 2 pictures with two captions; a.txt counts, not a.json, and so on"]


def test_edits_need_sources(tmp_path: Path) -> None:
    put(tmp_path, PAIR | {"list.csv": "file_name,text\na.png,a dot"})
    with pytest.raises(
        DataError, match="has no column with pictures to edit; it has file_name, text. Name it source, "
    ):
        opened(tmp_path, sources=True)


def test_a_caption_that_reads_like_a_table_is_its_pictures(tmp_path: Path) -> None:
    found = opened(put(tmp_path, PAIR | {"a.txt": "image, text", "b.txt": '{"image": "a.png", "text": "x"}'}))
    assert [caption for caption, *_ in read(found)] == ["image, text", '{"image": "a.png", "text": "x"}']


def test_samples_of_tars_without_sources(tmp_path: Path) -> None:
    plain = {"0.png": picture(1), "0.txt": b"a dot"}
    with pytest.raises(DataError, match=r"none of 1 picture has one to edit \(KEY\.source\.jpg\)\. Train in mode t2i"):
        opened(write_tar(tmp_path / "a.tar", plain), sources=True)
    found = opened(
        write_tar(tmp_path / "b.tar", plain | {"1.png": picture(2), "1.txt": b"x", "1.source.png": picture(4)}),
        sources=True,
    )
    assert read(found) == [("x", picture(2), picture(4))]
    assert [(fault.key, fault.reason) for fault in found.faults] == [("0", "has no picture to edit")]


def test_layouts_without_sources_do_not_edit(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": picture(1), "a.txt": "a dot"})
    with pytest.raises(DataError, match="no pictures to edit. Give a table with the columns source, target and prompt"):
        opened(tmp_path, sources=True)


def test_both_pictures_of_an_edit_are_cut_and_mirrored_alike(tmp_path: Path) -> None:
    """The sides of the source are other ones, in proportion: what is at the same place of both stays so."""
    image = np.zeros((96, 192, 3), np.uint8)
    image[:, :96] = (255, 0, 0)
    image[:32] = (0, 255, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).resize((384, 192), Image.Resampling.NEAREST).save(tmp_path / "b.png")
    put(tmp_path, {"x.csv": "source,target,prompt\nb.png,a.png,a dot"})
    shaping = Shaping(64, 64, crop="random", flip=True)
    data = CaptionedImages([opened(tmp_path, sources=True)], shaping, sources=True)
    seen = set()
    for epoch in range(16):
        batch = data.batch([0], epoch=epoch)
        assert batch.targets is not None and batch.sources is not None
        apart = (batch.targets - batch.sources).abs().amax(dim=1)[0]
        assert (apart > 0.2).float().mean() < 4 / 64  # but at the edges of colours, where the filters differ
        seen.add((batch.targets[0, 0, 60, 0].item() > 0.5, batch.targets[0, 0, 60, -1].item() > 0.5))
    assert len(seen) > 1


def test_an_id_of_the_hub_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        open_sets([SetOptions(Path("nobody/none"))], Reading(True, local_files_only=True))
    told = str(caught.value)
    assert told.startswith(
        "nobody/none: there is no such file or folder, nor could it be had from the Hugging Face Hub: "
    )
    assert "hf download --repo-type dataset nobody/none --local-dir FOLDER, and give the folder" in told


def test_a_dataset_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, BYTES, {"image": ""})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"is a Hugging Face dataset, and the package datasets is missing\. Install the ex"
    ):
        opened(tmp_path)
    with pytest.raises(
        DataError, match=r"no/where: there is no such file or folder\. Correct the path; datasets of the H"
    ):
        open_sets([SetOptions(Path("no/where"))], Reading(True))
