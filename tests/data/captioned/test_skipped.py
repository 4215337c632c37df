"""The file of left-out samples: each once, whoever met it and however often the run resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_training.data import DataError
from glm_training.data.captioned.samples import Fault
from glm_training.data.captioned.skipped import SkippedSamples
from tests.data.captioned.building import captioned, dataset, picture, write_tar


def lines(folder: Path, name: str = "skipped_samples.jsonl") -> list[dict[str, str]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def fault(key: str) -> Fault:
    return Fault(Path("a.tar"), key, "is broken", "Mend it")


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    members = captioned(range(20)) | {"0003.png": b"\x89PNG", "0004.png": picture(4, (90, 20)), "0020.png": picture(20)}
    path = write_tar(tmp_path / "a.tar", members)
    data = dataset(path, max_bad_fraction=0.2, skipped_dir=tmp_path / "run", try_first=3)  # 0, 6 and 13 alone
    assert not (tmp_path / "run").exists()  # looking at the data leaves nothing behind
    data.batch([0])
    assert [(line["kind"], line["file"], line["key"], line["reason"]) for line in lines(tmp_path / "run")] == [
        ("broken", str(path), "0020", "has no caption")
    ]
    data.batch([3, 4])
    data.batch([4, 3], epoch=1)
    found = lines(tmp_path / "run")
    assert [(line["kind"], line["key"]) for line in found[1:]] == [("broken", "0003"), ("unsuitable", "0004")]
    assert "is not an image" in found[1]["reason"] and found[2]["reason"] == "has 90 x 20 pixels"


def test_a_resumed_run_goes_on_with_the_file(tmp_path: Path) -> None:
    members = captioned(range(20)) | {f"{number:04d}.png": b"\x89PNG" for number in (3, 5, 7)}
    path = write_tar(tmp_path / "a.tar", members)
    options = {"max_bad_fraction": 0.1, "skipped_dir": tmp_path / "run", "try_first": 0}
    dataset(path, **options).batch([3, 5])
    with (tmp_path / "run/skipped_samples.jsonl").open("ab") as file:
        file.write(b'{"kind": "bro')  # a kill has torn it
    resumed = dataset(path, **options)
    resumed.batch([5, 3], epoch=1)
    whole = (tmp_path / "run/skipped_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in whole if line.endswith("}")] == ["0003", "0005"]
    with pytest.raises(DataError, match="3 of 20 samples cannot be used"):
        resumed.batch([7])
    whole = (tmp_path / "run/skipped_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert whole[2] == '{"kind": "bro' and json.loads(whole[3])["key"] == "0007"


def test_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    main, other = (SkippedSamples(tmp_path, 100, 0.5, rank) for rank in (0, 3))
    main.note([fault("known")])
    main.begin([fault("known")])
    other.begin([fault("known")])
    main.add(fault("a"))
    other.add(fault("b"))
    other.add(fault("odd"), unsuitable=True)
    other.add(fault("b"))
    assert [line["key"] for line in lines(tmp_path)] == ["known", "a"]
    assert [line["key"] for line in lines(tmp_path, "skipped_samples-3.jsonl")] == ["b", "odd"]
    alone = SkippedSamples(tmp_path, 100, 0.5)
    alone.begin([fault("known")])
    for key in ("known", "a", "b", "c"):
        alone.add(fault(key))
    alone.add(fault("odd"), unsuitable=True)
    assert alone.counts() == (4, 1)
    assert [line["key"] for line in lines(tmp_path)] == ["known", "a", "c"]


def test_a_folder_that_takes_no_files_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    skipped = SkippedSamples(tmp_path / "run", 10, 0.5)
    skipped.begin([])
    skipped.add(fault("a"))
    assert skipped.counts() == (1, 0) and "writing skipped_samples.jsonl failed" in caplog.text


def test_without_a_folder_samples_are_counted_alone() -> None:
    skipped = SkippedSamples(None, 10, 0.1)
    skipped.begin([])
    skipped.add(fault("a"))
    with pytest.raises(DataError, match="2 of 10 samples"):
        skipped.add(fault("b"))
