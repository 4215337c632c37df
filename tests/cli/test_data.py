"""`glm-train data`: what it tells of own pictures, and what it leaves behind."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from glm_training.cli import main
from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.survey import survey, words_of
from tests.data.captioned.building import opened, picture
from tests.runs import write_config


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["glm-train", *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures of two shapes and a copy, in the current directory; the file names no size."""
    folder = tmp_path / "pics"
    folder.mkdir()
    for number in range(12):
        size = (128, 128) if number % 2 else (256, 128)
        (folder / f"p{number:02d}.png").write_bytes(picture(number, size))
        (folder / f"p{number:02d}.txt").write_text(f"picture {number}")
    (folder / "copy.jpg").write_bytes(picture(1, (128, 128)))
    (folder / "copy.txt").write_text("the same again and again")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"name": "tiny-random"}, "data": {"images": "pics"}}))
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_was_understood(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "data", "run.yaml", "data.validation=0.3") == 0
    told, errors = capsys.readouterr()
    assert errors == "" and max(map(len, told.splitlines())) <= 80
    for line in (
        r"data      pics\n          13 pictures, read as a folder of pictures, each with a \.txt of the\n",
        r"held out  \d of 13 \(data\.validation 0\.3\): .*p\d\d\.png",
        r"sizes     128 x 128 to 256 x 128 px; in training \(width x height\):\n",
        r"128 x 128 +7 +none +0%\n",
        r"captions  2 to 5 words, half of them 2 or fewer\n          the longest: the same again and again\n",
        r"the model reads all of them whole\n",
        r"copies    1 picture the same as another, byte for byte:\n          copy\.jpg = p01\.png\n",
        r"faults    none\n",
        r"sheet     runs/run/data/contact_sheet\.png\n",
    ):
        assert re.search(line, told), line
    first = Path("runs/run/data/contact_sheet.png").read_bytes()
    assert run(monkeypatch, "data", "run.yaml", "data.validation=0", "data.trigger_word=sks") == 0
    told = capsys.readouterr().out
    assert "held out" not in told and "the longest: sks, the same again and again" in told
    assert Path("runs/run/data/contact_sheet.png").read_bytes() == first
    with Image.open("runs/run/data/contact_sheet-2.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    assert sorted(path.name for path in Path("runs/run").iterdir()) == ["data"]


def test_what_a_run_would_stop_at(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "p03.txt").write_text("")
    (own / "p04.png").write_bytes(b"no picture")
    (own / "thin.png").write_bytes(picture(1, (100, 20)))
    (own / "thin.txt").write_text("thin")
    assert run(monkeypatch, "data", "run.yaml") == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "faults 2 of 14: a run stops at these" in told and "left out 1 picture, too small or too long:" in told
    assert "p03.txt: its caption is empty" in told and "p04.png: is not an image" in told
    assert run(monkeypatch, "data", "run.yaml", "data.max_bad_fraction=0.2") == 0
    assert "left out, as data.max_bad_fraction allows" in " ".join(capsys.readouterr().out.split())
    for number in range(12):
        (own / f"bad{number}.png").write_bytes(b"no picture")
        (own / f"bad{number}.txt").write_text("bad")
    assert run(monkeypatch, "data", "run.yaml") == 2
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("is not an image") == 13 and " more" not in told, "as many as the run itself would name"
    assert run(monkeypatch, "data", "run.yaml", "data.images=nowhere") == 2
    assert "nowhere: there is no such file or folder" in capsys.readouterr().err


def test_pictures_of_several_sets_are_named_with_the_way_there(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(own, own.parent / "again")
    assert run(monkeypatch, "data", "run.yaml", "data.images=[pics, again]") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "pics/p00.png = again/p00.png" in told
    held = re.search(r"held out \d of 26 \(data\.validation 0\.05\): (.*) sizes", told)
    names = [name.split("/") for name in held[1].split(", ")]
    assert {place for place, _ in names} == {"pics", "again"} and len({name for _, name in names}) < len(names)


def test_where_all_pictures_are_too_small(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", "run.yaml", "data.min_side=500") == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "left out 13 pictures, too small or too long: pics/" in told and "captions" not in told
    assert "data.image_size too. pics" in told and "max_bad_fraction" not in told
    assert told.endswith("faults no picture is left to train on: a run does not start")


def test_without_the_models_files(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(monkeypatch, "data", "run.yaml", "model.name=nobody/none") == 0
    told = capsys.readouterr().out
    assert "model     cannot load nobody/none: " in told and "\n          What to do: download it" in told
    told = " ".join(told.split())
    assert "how long the prompts are for nobody/none is told once its tokenizers are here" in told
    assert run(monkeypatch, "data", "run.yaml", "model.name=./gone") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "how long the prompts are for ./gone is told" in told and "faults none" in told


def test_data_in_the_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    assert run(monkeypatch, "data", str(path)) == 0
    told = capsys.readouterr().out
    assert "4 training prompts" in told and "captions  3 to 7 words" in told and "contact_sheet.png" in told


def test_what_is_resized_and_cut(tmp_path: Path) -> None:
    for name, size in (("a", (200, 100)), ("b", (32, 16)), ("c", (50, 50))):
        (tmp_path / f"{name}.png").write_bytes(picture(1, size))
        (tmp_path / f"{name}.txt").write_text(name)
    shaping = Shaping(64, 64, min_side=15)
    found = survey(CaptionedImages([opened(tmp_path)], shaping, max_bad_fraction=1.0, try_first=0))
    assert [(one.shape, one.size, one.scale, one.cut) for one in found.seen] == [
        ((100, 200), (64, 64), 0.64, 0.5), ((16, 32), (64, 64), 4.0, 0.5), ((50, 50), (64, 64), 1.28, 0.0)
    ]  # fmt: skip
    assert (found.total, found.looked_at, found.broken, found.unsuitable) == (3, 3, [], [])
    assert found.copies() == []
    few = survey(CaptionedImages([opened(tmp_path)], shaping, max_bad_fraction=1.0, try_first=0), most=2)
    assert [one.prompt for one in few.seen] == ["a", "b"] and (few.total, few.looked_at) == (3, 2)
    assert list(words_of(["a red dot", "", "一只 小猫", "naïve café"])) == [3, 0, 4, 2]
