"""GenEval's layout, prompts and judge, on pictures of the tiny world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from glm_training.evaluation.suites.detectors import ShapesColors, ShapesDetector
from glm_training.evaluation.suites.geneval.prompts import read_prompts
from glm_training.evaluation.suites.geneval.rules import TAGS, verdict
from glm_training.evaluation.suites.geneval.suite import GenEval
from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.evaluation.suites.stages import Place, generate, judge, score
from glm_training.utils.distributed import World
from tests.small_world import Jitter, draw, parse

TINY = Path(__file__).parents[4] / "data/benchmarks/geneval_tiny.jsonl"
LINE = '{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"}'


def suite(prompts: Path | None, samples: int = 2) -> GenEval:
    records = None if prompts is None else read_prompts(prompts)
    return GenEval(records, samples, ShapesDetector(), ShapesColors())


def world_maker(pictures):
    """What the prompts ask for; sample 1 of each upside down."""
    images = [draw(parse(picture.prompt), Jitter(0, 0)) for picture in pictures]
    return [
        image.rotate(180) if picture.samples == (1,) else image for picture, image in zip(pictures, images, strict=True)
    ]


def test_what_the_shipped_prompts_ask_for_is_right_and_upside_down_all_but_positions(tmp_path):
    assert {record["tag"] for record in read_prompts(TINY)} == set(TAGS)
    tested, place = suite(TINY, samples=2), Place(tmp_path)
    generate(tested, world_maker, {}, place, World(), at_once=8)
    judge(tested, place, World())
    figures = {figure.name: figure for figure in score(tested, place, World()).figures}
    # colours and counts of shapes stay: how much of its box a shape fills does not know of up and down
    assert {tag: figures[tag].value for tag in TAGS} == {tag: 0.5 if tag == "position" else 1.0 for tag in TAGS}
    assert figures["prompts with a right picture"].value == 1.0
    assert (figures["position"].error, figures["position"].count) == (0.0, 16)


def test_the_layout_is_the_benchmarks(tmp_path):
    path = tmp_path / "prompts.jsonl"
    second = LINE.replace("red", "blue")
    path.write_text(LINE + "\n" + second + "\n")
    tested, place = suite(path), Place(tmp_path / "out")
    generate(tested, world_maker, {}, place, World(), at_once=3)
    names = {p.relative_to(place.out).as_posix() for p in place.out.rglob("*") if p.is_file()}
    assert names == {
        "settings.json", "00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png",
        "00001/metadata.jsonl", "00001/samples/0000.png", "00001/samples/0001.png",
    }  # fmt: skip
    assert json.loads((place.out / "00001/metadata.jsonl").read_text()) == json.loads(second)


def test_a_folder_in_the_layout_brings_its_own_prompts_and_what_it_lacks_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([LINE, LINE.replace("red", "blue"), LINE.replace("red", "green")]))
    images = Place(tmp_path / "drawn")
    generate(suite(path), world_maker, {}, images, World(), at_once=3)
    (images.out / "00001/samples/0000.png").unlink()
    (images.out / "00001/samples/0001.png").unlink()
    (images.out / "00002/samples/notes.txt").write_text("no picture of the benchmark")
    tested, place = suite(None), Place(tmp_path / "out", images.out)
    judge(tested, place, World())
    scores = score(tested, place, World())
    assert scores.figures[0].value == 1.0 and scores.figures[0].count == 4
    assert "00001/samples/0000.png" in scores.remarks[-1] and "does not exist" in scores.remarks[-1]


def test_prompts_that_are_not_those_of_the_folder_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(LINE + "\n" + LINE.replace("red", "blue"))
    images = Place(tmp_path / "drawn")
    generate(suite(path), world_maker, {}, images, World(), at_once=3)
    path.write_text(LINE + "\n")
    with pytest.raises(EvaluationError, match=r"00001/metadata.jsonl:1: is of line 2, and --prompts has 1"):
        judge(suite(path), Place(tmp_path / "out", images.out), World())
    path.write_text(LINE.replace("red", "green") + "\n" + LINE.replace("red", "blue"))
    with pytest.raises(EvaluationError, match=r"00000/metadata.jsonl:1: is not line 1 of --prompts"):
        judge(suite(path), Place(tmp_path / "out", images.out), World())
    (images.out / "00000/metadata.jsonl").write_text("{")
    with pytest.raises(EvaluationError, match=r"00000/metadata.jsonl:1: is not JSON"):
        judge(suite(None), Place(tmp_path / "out", images.out), World())
    assert not (tmp_path / "out/records.jsonl").exists()


def test_a_record_holds_all_that_the_rules_need(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(LINE)
    tested, place = suite(path, samples=1), Place(tmp_path / "out")
    generate(tested, world_maker, {}, place, World(), at_once=3)
    judge(tested, place, World())
    (record,) = map(json.loads, (place.out / "records.jsonl").read_text().splitlines())
    (detection,) = record["detections"]
    assert detection["colors"] == {"red": 1.0} and detection["class"] == "circle" and record["size"] == [128, 128]
    # a circle of radius 28 in the middle
    assert detection["box"] == pytest.approx([36, 36, 92, 92], abs=1.5)
    assert verdict(record["detections"], record["metadata"]) == (True, [])


def test_a_picture_of_another_size_and_mode_is_judged_too(tmp_path):
    images = tmp_path / "images"
    (images / "00000/samples").mkdir(parents=True)
    (images / "00000/metadata.jsonl").write_text(LINE)
    draw(parse("a red circle"), Jitter(0, 0)).resize((256, 192)).convert("P", palette=Image.Palette.ADAPTIVE).save(
        images / "00000/samples/0000.png"
    )
    tested, place = suite(None), Place(tmp_path / "out", images)
    judge(tested, place, World())
    assert score(tested, place, World()).figures[0].value == 1.0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "2: is empty. Remove the line"),
        ("{", "2: is not JSON"),
        ("[1]", "2: is not a JSON object"),
        (LINE.replace('"tag": "colors", ', ""), "2: has no tag. Write one of single_object"),
        (LINE.replace('"colors"', '"colour"'), "2: has the tag 'colour'"),
        (LINE.replace('"a red circle"', '" "'), "2: the prompt of index 1 is empty"),
        (LINE.replace('"prompt": "a red circle"', '"text": "a"'), "2: key 'prompt' is missing"),
        (LINE.replace('"include"', '"includes"'), '2: has no "include"'),
        (LINE.replace('"class": "circle", ', ""), '2: include[0] has no "class"'),
        (LINE.replace('"count": 1', '"count": 0'), '2: include[0] has "count" 0'),
        (LINE.replace('"count": 1', '"count": true'), '2: include[0] has "count" True'),
        (LINE.replace('"color": "red"', '"color": "teal"'), "2: include[0] has \"color\" 'teal'. Write one of red"),
        (LINE.replace('"color": "red"', '"position": ["left of", 0]'), '2: include[0] has "position"'),
        (
            LINE.replace('"color": "red"', '"colour": "red"'),
            "2: include[0] has the unknown key 'colour'. Known are class",
        ),
        (LINE.replace("]", '], "excludes": []'), "2: has the key 'excludes'. Did you mean \"exclude\"?"),
        (LINE.replace(', "color": "red"', ""), "2: is of the tag colors and asks for no color"),
        (LINE.replace('"colors"', '"position"'), "2: is of the tag position and asks for no position"),
        pytest.param("[" * 100_000, "2: is not JSON (maximum recursion depth", id="deep"),
        (LINE, "2: repeats line 1"),
    ],
)
def test_a_hole_in_the_prompts_is_told_with_its_line(tmp_path, line, expected):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([LINE, line, LINE.replace("red", "blue")]) + "\n")
    with pytest.raises(EvaluationError) as raised:
        read_prompts(path)
    told = str(raised.value)
    assert f"{path}:{expected}" in told and told.count("prompts.jsonl:") == 1


def test_a_note_of_the_users_own_is_no_hole(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(LINE.replace('"prompt"', '"source": "mine", "prompt"'))
    assert [record["source"] for record in read_prompts(path)] == ["mine"]


def in_layout(folder: Path, *numbers: str, samples: tuple[str, ...] = ("0000.png",)) -> Path:
    for number in numbers:
        (folder / number / "samples").mkdir(parents=True)
        (folder / number / "metadata.jsonl").write_text("\ufeff" + LINE + "\r\n", encoding="utf-8")
        for sample in samples:
            draw(parse("a red circle"), Jitter(0, 0)).save(folder / number / "samples" / sample)
    return folder


def test_two_folders_of_one_number_are_refused(tmp_path):
    images = in_layout(tmp_path / "images", "00000", "0", "00001")
    with pytest.raises(EvaluationError, match=r"images/00000: is number 0, as 0 is. Remove one of them"):
        suite(None).find(images)


def test_folders_that_are_called_otherwise_are_no_prompts(tmp_path):
    images = in_layout(tmp_path / "images", "00000", "\u00b2", "notes", "x00001")
    assert [picture.path for picture in suite(None).find(images)] == ["00000/samples/0000.png"]


def test_pictures_that_would_not_be_judged_are_named(tmp_path):
    images = in_layout(tmp_path / "images", "00000", samples=("0000.png", "0001.jpg", "0002.webp", "preview.jpg"))
    with pytest.raises(EvaluationError) as raised:
        suite(None).find(images)
    assert [f"samples/{name}: is no .png" in str(raised.value) for name in ("0001.jpg", "0002.webp")] == [True, True]
    assert "preview" not in str(raised.value)


def test_another_number_of_pictures_of_a_prompt_is_said(tmp_path):
    images = in_layout(tmp_path / "images", "00000", "00001", samples=("0000.png", "0001.png", "0002.png"))
    tested, place = suite(None), Place(tmp_path / "out", images)
    judge(tested, place, World())
    assert not [remark for remark in score(tested, place, World()).remarks if "of a prompt" in remark.lower()]
    (images / "00001/samples/0002.png").unlink()
    (images / "00001/samples/0001.png").unlink()
    judge(tested, place, World())
    assert "Of a prompt 1 to 3 pictures were judged." in score(tested, place, World()).remarks


def test_all_holes_are_told_at_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join([LINE.encode(), b"", b"{", b"\xff", LINE.encode()]))
    with pytest.raises(EvaluationError) as raised:
        read_prompts(path)
    assert [f"{path}:{line}:" in str(raised.value) for line in (1, 2, 3, 4, 5)] == [False, True, True, True, True]


def test_prompts_that_are_not_there_are_told_with_where_they_come_from(tmp_path):
    with pytest.raises(EvaluationError, match="github.com/djghosh13/geneval"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
