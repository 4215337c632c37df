"""Preference pairs in datasets of the real `datasets` library, in the shape of yuvalkirstain/pickapic_v2."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from glm_training.data.preference.dataset import PreferenceDataset
from glm_training.data.preference.scan import load_pairs
from glm_training.data.problems import DataError

LABELS = (1.0, 0.0, 0.5, 1.0)
Save = Callable[[datasets.Dataset, Path], None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(seed: int) -> bytes:
    """A JPEG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def pickapic() -> datasets.Dataset:
    """Four rows, one of them a tie, with some of the columns that are not read."""
    rows = [
        {
            "are_different": True,
            "caption": f"a thing {index} ",
            "has_label": True,
            "jpg_0": encoded(index),
            "jpg_1": encoded(100 + index),
            "label_0": label,
            "label_1": 1 - label,
            "url_0": "https://example.org/0.png",
        }
        for index, label in enumerate(LABELS)
    ]
    return datasets.Dataset.from_list(rows)


def one(dataset: datasets.Dataset, folder: Path) -> None:
    dataset.save_to_disk(folder)


def several(dataset: datasets.Dataset, folder: Path) -> None:
    datasets.DatasetDict({"validation_unique": dataset.select([1]), "train": dataset}).save_to_disk(folder)


def images(dataset: datasets.Dataset, folder: Path) -> None:
    image = datasets.Image()
    dataset.cast_column("jpg_0", image).cast_column("jpg_1", image).save_to_disk(folder)


def arrays(dataset: datasets.Dataset, folder: Path) -> None:
    dataset.with_format("torch").save_to_disk(folder)


def hub(dataset: datasets.Dataset, folder: Path) -> None:
    """Files named and placed as in the hub's repository."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 959040\n---\n")
    dataset.select([0, 1]).to_parquet(folder / "data/train-00000-of-00002-b66ac786bf6fb553.parquet")
    dataset.select([2, 3]).to_parquet(folder / "data/train-00001-of-00002-11e3c6a7cdd2ef2b.parquet")
    dataset.select([1]).to_parquet(folder / "data/validation_unique-00000-of-00001-33ead111845fc9c4.parquet")


def plain(dataset: datasets.Dataset, folder: Path) -> None:
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    dataset.select([1]).to_parquet(folder / "validation_unique.parquet")


def converted(dataset: datasets.Dataset, folder: Path) -> None:
    """As in the branch that the hub converts to parquet."""
    for name, part in (("train", dataset), ("validation_unique", dataset.select([1]))):
        (folder / "default" / name).mkdir(parents=True)
        part.to_parquet(folder / "default" / name / "0000.parquet")


@pytest.mark.parametrize("save", [one, several, images, arrays, hub, plain, converted])
def test_the_pairs_of_a_dataset(tmp_path: Path, save: Save) -> None:
    save(pickapic(), tmp_path / "pairs")
    report = load_pairs(tmp_path / "pairs", num_workers=2)
    assert (report.total, report.ties, report.quarantined) == (4, 1, [])
    assert [(pair.index, pair.prompt) for pair in report.pairs] == [(row, f"a thing {row}") for row in (0, 1, 3)]
    assert [pair.preferred.read() for pair in report.pairs] == [encoded(seed) for seed in (0, 101, 3)]
    assert [pair.rejected.read() for pair in report.pairs] == [encoded(seed) for seed in (100, 1, 103)]
    batch = PreferenceDataset(report.pairs, height=32, width=32, num_workers=2).batch([2, 0])
    assert batch.images is not None and batch.images.pixels.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("save", [several, hub, plain, converted])
def test_a_split_is_chosen_and_a_wrong_one_named(tmp_path: Path, save: Save) -> None:
    save(pickapic(), tmp_path / "pairs")
    (pair,) = load_pairs(tmp_path / "pairs", split="validation_unique").pairs
    assert (pair.index, pair.prompt) == (0, "a thing 1")
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path / "pairs", split="valid")
    assert "has no split 'valid' but " in str(caught.value) and "validation_unique" in str(caught.value)


@pytest.mark.parametrize("save", [one, plain])
def test_rows_and_columns_at_fault_are_named(tmp_path: Path, save: Save) -> None:
    rows = pickapic().to_list()
    rows[0]["label_0"], rows[1]["caption"], rows[3]["jpg_1"] = None, "", b"no image"
    save(datasets.Dataset.from_list(rows), tmp_path / "rows")
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path / "rows")
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 3
    assert "label_0 is None" in found[0] and "prompt of index 1 is empty" in found[1]
    assert "rejected image is not an image" in found[2]
    save(pickapic().rename_column("jpg_1", "image_1"), tmp_path / "columns")
    with pytest.raises(DataError, match="lacks the columns jpg_1; it has are_different, caption"):
        load_pairs(tmp_path / "columns")
    save(pickapic().cast_column("jpg_0", datasets.Value("large_binary")), tmp_path / "large")
    assert len(load_pairs(tmp_path / "large").pairs) == 3


@pytest.mark.parametrize(
    ("save", "file", "remedy"),
    [
        (one, "state.json", "Save it again with save_to_disk"),
        (one, "data-00000-of-00001.arrow", "Save it again with save_to_disk"),
        (plain, "train.parquet", "Download its files again"),
    ],
)
def test_a_truncated_file_is_explained(tmp_path: Path, save: Save, file: str, remedy: str) -> None:
    folder = tmp_path / "pairs"
    save(pickapic(), folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    assert remedy in fault(folder)


def test_a_parquet_file_that_cannot_be_converted_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    hub(pickapic(), folder)
    file = next(folder.glob("data/train-00001*"))
    data = bytearray(file.read_bytes())
    rest = 8 + int.from_bytes(data[-8:-4], "little")  # its directory, at the end, stays whole
    file.write_bytes(data[:4] + bytes(len(data) - 4 - rest) + data[-rest:])
    assert "Couldn't deserialize" in fault(folder)
    pickapic().rename_column("jpg_1", "image_1").to_parquet(file)
    assert "column names don't match" in fault(folder)


def fault(folder: Path) -> str:
    with pytest.raises(DataError, match="cannot be opened as a Hugging Face dataset: ") as caught:
        load_pairs(folder)
    (problem,) = caught.value.problems
    assert "error occurred while generating" not in str(problem) and len(str(problem).splitlines()) == 1
    return str(problem)
