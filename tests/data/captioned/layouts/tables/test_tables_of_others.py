"""Tables as libraries and people write them: what would be read as something else is told instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from glm_training.data.captioned.samples import ImageSet
from glm_training.data.problems import DataError
from tests.data.captioned.building import picture


def put(folder: Path, **texts: str) -> Path:
    """Pictures `a.png` and `b.png` and, each named by its stem and ending with `_` between, texts."""
    for number, name in enumerate(("a.png", "b.png"), start=1):
        (folder / name).write_bytes(picture(number))
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8", newline="")
    return folder


def opened(path: Path, **options: object) -> ImageSet:
    return open_sets([SetOptions(path, **options)], Reading(True))[0]  # type: ignore[arg-type]


def captions(found: ImageSet) -> list[str | None]:
    return [found.read(row).caption for row in range(len(found))]


def test_a_column_that_numbers_rows_has_no_name(tmp_path: Path) -> None:
    """As pandas writes a table unless it is told not to."""
    put(tmp_path, x_csv=",file_name,text\n0,a.png,a dot\n1,b.png,two dots\n")
    assert captions(opened(tmp_path)) == ["a dot", "two dots"]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ('a.png,"a dot\nb.png,two dots\n', 2),  # not closed: it would be one caption, and a record less
        ('a.png,a dot\nb.png,"OPEN" on a sign\n', 3),  # the words to draw would lose their quotes
        ('a.png,"a\ndot"\nb.png,"""OPEN" on a sign\n', 4),
    ],
)
def test_quotes_that_are_no_csv_are_told_with_their_line(tmp_path: Path, record: str, line: int) -> None:
    put(tmp_path, x_csv="file_name,text\n" + record)
    with pytest.raises(DataError, match="begins a record that is no CSV.*each of its own twice") as caught:
        opened(tmp_path)
    assert caught.value.problems[0].line == line


def test_quotes_inside_a_text_stay(tmp_path: Path) -> None:
    put(tmp_path, x_csv='file_name,text\na.png,a sign "OPEN"\nb.png,"""OPEN"", red\non white"\n')
    assert captions(opened(tmp_path)) == ['a sign "OPEN"', '"OPEN", red on white']


def test_tables_that_are_read_together_are_told_and_have_no_splits(tmp_path: Path) -> None:
    put(tmp_path, train_csv="file_name,text\na.png,a dot\n", test_csv="file_name,text\nb.png,two dots\n")
    told = f"{tmp_path}: 2 tables are read (test.csv, train.csv); the path may name one of them"
    assert opened(tmp_path).remarks == [told]
    assert captions(opened(tmp_path / "train.csv")) == ["a dot"]
    with pytest.raises(DataError, match="that has no splits. Name the file or folder of train, and remove split"):
        opened(tmp_path, split="train")


def test_labels_are_captions_by_their_names_and_both_splits_count_for_a_resume(tmp_path: Path) -> None:
    """The digest of a dataset of which two splits are read changes with either."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets")

    def digests(first: list[int]) -> dict[str, str]:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        splits = {
            name: datasets.Dataset.from_dict({"image": [{"bytes": picture(1)}] * 2, "label": labels}, features=features)
            for name, labels in (("train", first), ("test", [0, 0]))
        }
        path = tmp_path / str(first)
        datasets.DatasetDict(splits).save_to_disk(path)
        sets = [opened(path, cap_source="label", split=split) for split in ("train", "test")]
        assert captions(sets[0]) == [["cat", "dog"][label] for label in first]
        pictures = CaptionedImages(sets, Shaping(64, 64))
        return dict(zip("x", pictures.example_digests().values(), strict=True))

    assert digests([0, 1]) != digests([1, 0])
