"""Preference pairs: three layouts, every fault at once, ties counted, crops named by seeds, digests by content."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.data.fingerprint import describe_drift
from glm_training.data.pictures.images import decode_image
from glm_training.data.preference.dataset import (
    FileImage,
    PreferenceDataset,
    PreferencePair,
    distinct_prompts,
    image_digest,
    load_cropped,
    stack_rows,
)
from glm_training.data.preference.scan import load_pairs
from glm_training.data.preference.table import read_table
from glm_training.data.problems import DataError


def paint(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def record(index: int) -> dict[str, object]:
    return {"prompt": f"a thing {index}", "preferred": f"images/{index}_a.png", "rejected": f"images/{index}_b.png"}


def judged(index: int, label: object) -> dict[str, object]:
    return {
        "caption": f"a thing {index}",
        "jpg_0": f"images/{index}_a.png",
        "jpg_1": f"images/{index}_b.png",
        "label_0": label,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of four pairs, no listing yet."""
    for index in range(4):
        paint(tmp_path / f"images/{index}_a.png", index)
        paint(tmp_path / f"images/{index}_b.png", 100 + index)
    return tmp_path


def write_lines(folder: Path, records: list[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in records]
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_list(folder: Path, records: list[object]) -> Path:
    """One record per line from line 2 on, as an editor would show it."""
    rows = [row if isinstance(row, str) else json.dumps(row) for row in records]
    path = folder / "human_feedback.json"
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    return path


def pair_digests(pairs) -> dict[str, str]:
    return PreferenceDataset(pairs, height=32, width=32).example_digests()


def problems(path: Path, **options) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_pairs(path, **options)
    return [str(problem) for problem in caught.value.problems]


class Rows:
    """A table in memory, as ``datasets.Dataset`` offers it."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0]) if self.rows else ["caption", "jpg_0", "jpg_1", "label_0"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        return self.rows[key] if isinstance(key, int) else [row[key] for row in self.rows]


def in_table(folder: Path, index: int, label: object) -> dict[str, object]:
    images = {f"jpg_{i}": (folder / f"images/{index}_{'ab'[i]}.png").read_bytes() for i in (0, 1)}
    return {"caption": f"a thing {index}", **images, "label_0": label}


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_lines, write_list])
def test_folder_and_file_give_the_same_pairs(folder, write) -> None:
    path = write(folder, [record(index) for index in range(4)])
    report = load_pairs(folder)
    assert report == load_pairs(path) and (report.ties, report.total, report.quarantined) == (0, 4, [])
    images = (folder / "images").resolve()
    assert report.pairs[3] == PreferencePair(
        3, "a thing 3", FileImage(images / "3_a.png"), FileImage(images / "3_b.png")
    )


@pytest.mark.parametrize("write", [write_lines, write_list])
def test_labels_order_the_images_and_ties_are_dropped_and_counted(folder, write) -> None:
    write(folder, [judged(0, 1), judged(1, 0), judged(2, 0.5), judged(3, 1.0)])
    report = load_pairs(folder)
    assert [pair.index for pair in report.pairs] == [0, 1, 3] and (report.ties, report.total) == (1, 4)
    assert [pair.preferred.path.name for pair in report.pairs] == ["0_a.png", "1_b.png", "3_a.png"]
    assert [pair.rejected.path.name for pair in report.pairs] == ["0_b.png", "1_a.png", "3_b.png"]


def test_only_ties_leave_nothing_to_train_on(folder) -> None:
    write_lines(folder, [judged(0, 0.5), judged(1, 0.5)])
    assert "all its pairs are ties" in problems(folder)[0]


def test_a_table_gives_the_pairs_of_the_files(folder) -> None:
    table = Rows([in_table(folder, index, label) for index, label in enumerate((1, 0, 0.5, 1.0))])
    listing = read_table(folder, table)
    assert [pair.index for pair in listing.pairs] == [0, 1, 3] and (listing.ties, listing.total) == (1, 4)
    write_lines(folder, [judged(0, 1), judged(1, 0), judged(2, 0.5), judged(3, 1)])
    files = load_pairs(folder).pairs
    assert pair_digests(listing.pairs) == pair_digests(files)
    batches = [PreferenceDataset(pairs, height=32, width=32).batch([1]) for pairs in (listing.pairs, files)]
    assert torch.equal(batches[0].images.pixels, batches[1].images.pixels)
    table.rows[0]["jpg_0"] = {"bytes": table.rows[0]["jpg_0"], "path": None}  # an Image feature, not decoded
    assert image_digest(listing.pairs[0].preferred) == image_digest(files[0].preferred)


def test_a_broken_table_is_explained(folder) -> None:
    rows = [in_table(folder, index, 1) for index in range(4)]
    rows[0]["label_0"], rows[1]["caption"], rows[2]["label_0"] = 2, " ", None
    found = [str(problem) for problem in read_table(folder, Rows(rows)).problems]
    assert len(found) == 3
    assert "label_0 is 2" in found[0] and "prompt of index 1 is empty" in found[1] and "label_0 is None" in found[2]
    missing = read_table(folder, Rows([{"caption": "x", "image_0": b""}])).problems
    assert "lacks the columns jpg_0, jpg_1, label_0; it has caption, image_0" in str(missing[0])
    assert "holds no pair" in str(read_table(folder, Rows([])).problems[0])
    rows[3]["jpg_1"] = {"bytes": None, "path": "elsewhere.jpg"}
    with pytest.raises(DataError, match="row 3: column 'jpg_1' holds no image bytes"):
        pair_digests(read_table(folder, Rows(rows)).pairs)


def test_a_missing_extra_is_named(folder, monkeypatch) -> None:
    (folder / "dataset_info.json").write_text("{}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name))
    assert 'pip install "glm_training[datasets]"' in problems(folder)[0]


# -- faults ------------------------------------------------------------------------------------------------------------

BAD = [
    ("[1]", "not a JSON object but list"),
    (record(1) | {"prompt": 3}, "key 'prompt' is not a text"),
    ({"preferred": "images/1_a.png", "rejected": "images/1_b.png"}, "key 'prompt' is missing"),
    (record(1) | {"prompt": " "}, "the prompt of index 1 is empty"),
    (record(1) | {"prompt": "\ud800"}, "surrogate"),
    (record(1) | {"chosen": "x"}, "unknown key 'chosen'"),
    (record(1) | {"prefered": "x"}, "Did you mean 'preferred'?"),
    ({"prompt": "x", "preferred": "images/1_a.png"}, "index 1 has no rejected image"),
    (record(1) | {"rejected": None}, "key 'rejected' is not a path"),
    (record(1) | {"rejected": "images/none.png"}, "does not exist"),
    (record(1) | {"rejected": "../outside.png"}, "leads out of"),
    (record(1) | {"rejected": "/etc/hostname"}, "absolute path"),
    (record(1) | {"rejected": "https://example.org/a.png"}, "is a URL"),
    (record(1) | {"rejected": "images"}, "rejected image is not a regular file"),
    (record(1) | {"rejected": "notes.md"}, "rejected image is not an image"),
    (record(1) | {"rejected": "images/1_a.png"}, "both images of the pair are the same file"),
    (judged(1, 2), "label_0 is 2, not one of 0, 0.5, 1"),
    (judged(1, True), "label_0 is True"),
    (judged(1, "1"), "label_0 is '1'"),
]


@pytest.mark.parametrize(("write", "line"), [(write_lines, 2), (write_list, 3)])
@pytest.mark.parametrize(("row", "expected"), BAD)
def test_a_bad_row_is_named_with_its_line(folder, write, line: int, row, expected: str) -> None:
    (folder / "notes.md").write_text("text")
    paint(folder.parent / "outside.png", 9)
    path = write(folder, [record(0), row, record(2), record(3)])
    found = problems(folder)
    assert len(found) == 1 and expected in found[0] and f"{path.name}:{line}: " in found[0], found
    report = load_pairs(folder, max_bad_fraction=0.25)
    assert [pair.index for pair in report.pairs] == [0, 2, 3] and len(report.quarantined) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x",', "not JSON"),
        ("", "the line is empty"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"prompt": "x", "prompt": "y"}', "key 'prompt' is given twice"),
    ],
)
def test_a_line_that_is_no_json(folder, line: str, expected: str) -> None:
    write_lines(folder, [record(0), line, record(2)])
    (found,) = problems(folder)
    assert expected in found and "metadata.jsonl:2: " in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "x"}', "human_feedback.json:1: index 0 has no preferred image"),
        ("a cat\n", "human_feedback.json:1: not JSON"),
        ("[]", "holds no pair"),
        ("", "holds no pair"),
        ('[\n{"prompt": "x",]', "human_feedback.json:2: not JSON"),
        ("[1, 2", "expecting ',' or ']'"),
        ("[1] 2", "extra data after the list"),
        ('[{"a": 1, "a": 2}]', "key 'a' is given twice"),
    ],
)
def test_a_file_that_is_no_list(folder, text: str, expected: str) -> None:
    (folder / "human_feedback.json").write_text(text)
    assert any(expected in problem for problem in problems(folder))


@pytest.mark.parametrize(
    ("name", "write"), [("pairs.json", write_lines), ("pairs.jsonl", write_list), ("a.txt", write_list)]
)
def test_content_tells_lines_from_a_list(folder, name: str, write) -> None:
    written = write(folder, [record(index) for index in range(4)]).rename(folder / name)
    assert [(pair.index, pair.prompt) for pair in load_pairs(written).pairs] == [(i, f"a thing {i}") for i in range(4)]


def test_a_file_that_does_not_begin_as_json_is_no_listing(folder) -> None:
    (folder / "pairs.csv").write_text("caption,jpg_0,jpg_1,label_0\nx,a.png,b.png,1\n" * 99)
    (found,) = problems(folder / "pairs.csv")
    assert "no listing of preference pairs" in found
    (folder / "train.parquet").write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    assert "is a Parquet table" in problems(folder / "train.parquet")[0]


def test_a_break_in_the_list_does_not_hide_what_came_before(folder) -> None:
    write_list(folder, [record(0) | {"rejected": "images/none.png"}, record(1), "{,"])
    found = problems(folder, max_bad_fraction=1.0)
    assert ":4: not JSON" in found[0] and ":2: rejected image" in found[1]


def test_all_faults_come_at_once_in_order(folder) -> None:
    write_lines(folder, [record(0) | {"prompt": ""}, record(1) | {"rejected": "no.png"}, record(2), record(3)])
    (folder / "images/2_b.png").write_bytes(b"no")
    (folder / "images/3_a.png").write_bytes((folder / "images/3_a.png").read_bytes()[:100])
    found = problems(folder)
    assert [text.split(":")[1] for text in found] == ["1", "2", "3", "4"]
    assert "2_b.png" in found[2] and "preferred image cannot be decoded" in found[3]
    assert len(load_pairs(folder, check_images=False, max_bad_fraction=0.5).pairs) == 2


def test_a_path_that_is_no_listing(folder) -> None:
    assert "holds neither metadata.jsonl nor human_feedback.json" in problems(folder)[0]
    write_lines(folder, [record(0)])
    write_list(folder, [record(0)])
    assert "holds both" in problems(folder)[0]
    assert "does not exist" in problems(folder / "none.txt")[0]
    named = problems("yuvalkirstain/pickapic_v2", split="validation_unique")[0]  # type: ignore[arg-type]
    assert "not downloaded by a run" in named and "split='validation_unique').save_to_disk('data/pickapic_v2')" in named
    assert "is a URL" in problems("https://example.org/data.jsonl")[0]  # type: ignore[arg-type]
    assert "does not exist; the current directory is" in problems(folder / "none.jsonl")[0]
    (folder / "utf.json").write_bytes(b'["\xff"]')
    assert "not UTF-8" in problems(folder / "utf.json")[0]
    with pytest.raises(ValueError, match="max_bad_fraction"):
        load_pairs(folder, max_bad_fraction=1.5)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_crop_is_the_part_of_the_resized_image_it_says(tmp_path) -> None:
    image = FileImage(paint(tmp_path / "wide.png", 0, size=(100, 40)))
    for position, crop in (((0.5, 0.5), (0, 34)), ((0.0, 0.0), (0, 0)), ((0.9, 0.9), (0, 62)), ((1.0, 1.0), (0, 68))):
        loaded = load_cropped(image, 32, 12, position)
        assert loaded.original_size == (40, 100) and loaded.crop == crop and loaded.pixels.shape == (3, 32, 12)
        resized = decode_image(image.path).resize((80, 32), Image.Resampling.LANCZOS)
        expected = torch.from_numpy(np.array(resized))[:, crop[1] : crop[1] + 12].permute(2, 0, 1)
        assert torch.equal(loaded.pixels, expected)
    assert load_cropped(image, 50, 50).pixels.shape == (3, 50, 50)  # enlarged
    with pytest.raises(ValueError, match="at least 1"):
        load_cropped(image, 0, 12)


def test_batches(folder) -> None:
    paint(folder / "images/1_b.png", 5, size=(64, 128))
    write_lines(folder, [record(index) for index in range(4)])
    dataset = PreferenceDataset(load_pairs(folder).pairs, height=32, width=32)
    batch = dataset.batch([1, 0])
    assert len(dataset) == 4 and batch.indices == [1, 0] and batch.prompts == ["a thing 1", "a thing 0"]
    assert [pair.index for pair in batch.pairs] == [1, 0] and len(batch.images) == 4
    assert batch.images.pixels.shape == (4, 3, 32, 32) and batch.images.pixels.dtype == torch.float32
    assert 0 <= batch.images.pixels.min() and batch.images.pixels.max() <= 1
    assert batch.images.original_sizes.tolist() == [[36, 40], [36, 40], [128, 64], [36, 40]]
    assert batch.images.crops[2:].tolist() == [[16, 0], [0, 2]]
    assert torch.equal(
        stack_rows([load_cropped(dataset.pairs[1].rejected, dataset.height, dataset.width)]).pixels[0],
        batch.images.pixels[2],
    )
    assert len({tuple(row.flatten()[:9].tolist()) for row in batch.images.pixels}) == 4
    for positions, error in (([], ValueError), ([4], IndexError), ([-1], IndexError)):
        with pytest.raises(error):
            dataset.batch(positions)
    with pytest.raises(ValueError, match="at least one pair"):
        PreferenceDataset([], height=32, width=32)
    with pytest.raises(ValueError, match="'center' or 'random'"):
        PreferenceDataset(dataset.pairs, height=32, width=32, crop="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 epochs were given for 1 positions"):
        dataset.batch([0], epoch=[0, 1])
    (folder / "images/0_a.png").unlink()
    with pytest.raises(DataError, match="0_a.png: does not exist"):
        dataset.batch([0])
    dataset.decodes = False
    assert dataset.batch([0]).images is None


def test_threads_give_the_same_batches(folder) -> None:
    write_lines(folder, [record(index) for index in range(4)])
    pairs = load_pairs(folder, num_workers=2).pairs
    alone, threaded = (PreferenceDataset(pairs, height=32, width=32, num_workers=n) for n in (0, 2))
    threaded.prefetch([3, 1])  # let go again
    threaded.prefetch([1, 0])
    for positions in ([1, 0], [2, 2]):
        assert torch.equal(threaded.batch(positions).images.pixels, alone.batch(positions).images.pixels)
    assert threaded.example_digests() == alone.example_digests()
    (folder / "images/3_b.png").unlink()
    threaded.prefetch([3])
    with pytest.raises(DataError, match="3_b.png: does not exist"):
        threaded.batch([3])
    threaded.close()
    assert len(threaded.batch([0]).images) == 2
    threaded.close()


def test_samples_are_drawn_for_the_first_different_prompts(folder) -> None:
    write_lines(folder, [record(0), record(1) | {"prompt": "a thing 0"}, record(2), record(3)])
    examples = distinct_prompts(load_pairs(folder).pairs, 2)
    assert [(example.index, example.prompt) for example in examples] == [(0, "a thing 0"), (1, "a thing 2")]


def test_random_crops_depend_on_seed_epoch_and_index_alone(folder) -> None:
    for index in range(4):
        paint(folder / f"images/{index}_a.png", index, size=(200, 40))
        paint(folder / f"images/{index}_b.png", index + 50, size=(200, 40))
    write_lines(folder, [record(index) for index in range(4)])
    pairs = load_pairs(folder).pairs

    def crops(positions, epoch=0, seed=0, chosen=pairs) -> list[list[int]]:
        dataset = PreferenceDataset(chosen, height=40, width=40, crop="random", seed=seed)
        batch = dataset.batch(positions, epoch=epoch)
        return batch.images.crops.tolist()

    state = torch.random.get_rng_state()
    first = crops([0, 1, 2, 3])
    assert len({left for _, left in first}) > 5 and all(top == 0 and 0 <= left <= 160 for top, left in first)
    assert crops([3, 1]) == [first[3], first[1], first[7], first[5]]
    assert crops([0], chosen=pairs[2:]) == [first[2], first[6]]
    assert crops([0, 1, 2, 3], epoch=[0, 1, 0, 0])[::4] == first[::4] != crops([0, 1, 2, 3], epoch=1)[::4]
    assert crops([0, 1, 2, 3], epoch=1) != first and crops([0, 1, 2, 3], seed=1) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digests_follow_the_content_and_not_the_place(folder) -> None:
    write_lines(folder, [record(index) for index in range(4)])
    before = pair_digests(load_pairs(folder).pairs)
    assert list(before) == ["0", "1", "2", "3"] and len(set(before.values())) == 4
    (folder / "images/0_a.png").rename(folder / "images/moved.png")
    swapped = {"prompt": "a thing 1", "preferred": "images/1_b.png", "rejected": "images/1_a.png"}
    write_lines(
        folder, [record(0) | {"preferred": "images/moved.png"}, swapped, record(2) | {"prompt": "x"}, record(3)]
    )
    (folder / "images/3_b.png").write_bytes((folder / "images/3_a.png").read_bytes())
    after = pair_digests(load_pairs(folder).pairs)
    changes = describe_drift(before, after)
    assert [line.split(":")[0] for line in changes] == ["index 1", "index 2", "index 3"]
