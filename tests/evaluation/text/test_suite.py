"""CVTG-2K and LongText-Bench as a suite: layouts, records and figures, judged by a real reader of drawn signs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.evaluation.suites.stages import Place, generate, judge, score
from glm_training.evaluation.text.prompts import TextPrompt, TextPrompts, read_prompts
from glm_training.evaluation.text.readers import OcrReader
from glm_training.evaluation.text.suite import ClipScorer, TextSuite, score_cvtg, score_longtext
from glm_training.rewards.clip import load_clip, load_tokenizer
from glm_training.utils.distributed import World
from tests.reward_files import write_clip

WORLD = World()


def signs(pictures) -> list[Image.Image]:
    """Shows the last quoted word of each prompt, or what `SHOWN` has in its place."""
    images = []
    for picture in pictures:
        image = Image.new("RGB", (200, 90), "white")
        word = picture.prompt.split("'" if "'" in picture.prompt else '"')[1]
        ImageDraw.Draw(image).text((20, 20), SHOWN.get(word, word), "black", ImageFont.load_default(size=36))
        images.append(image)
    return images


SHOWN = {"SOUP": "SOAP"}


def longtext(*words: str) -> TextPrompts:
    prompts = [TextPrompt(str(i), f'a sign that says "{word}"', (word,), "sign") for i, word in enumerate(words)]
    return TextPrompts("longtext", tuple(prompts))


def cvtg(*words: str) -> TextPrompts:
    prompts = [
        TextPrompt(f"CVTG/{2 + i}/{i}", f"a sign '{word}'", (word.lower(),), f"{2 + i} areas")
        for i, word in enumerate(words)
    ]
    return TextPrompts("cvtg", tuple(prompts))


def suite(prompts: TextPrompts, samples: int = 1, clip: ClipScorer | None = None) -> TextSuite:
    return TextSuite(prompts, samples, OcrReader("rapidocr", prompts.language), clip)


def run(tested: TextSuite, out: Path, images: Path | None = None):
    place = Place(out, images)
    if images is None:
        generate(tested, signs, {}, place, WORLD, at_once=4)
    judge(tested, place, WORLD)
    return score(tested, place, WORLD)


def test_longtext_from_pictures_to_figures(tmp_path):
    scores = run(suite(longtext("HOTEL", "SOUP", "OPEN NOW"), samples=2), tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["0.png", "0_1.png", "1.png", "1_1.png", "2.png", "2_1.png"]
    (figure,) = scores.figures
    # of 1 + 1 + 2 words, twice each, SOUP alone is not read; by prompt the deviations from 3/4 sum to 1/2, -3/2, 1
    assert (figure.name, figure.value, figure.count, figure.of) == ("text score (en)", 0.75, 8, "words")
    assert figure.error == pytest.approx(math.sqrt(3 / 2 * (0.25 + 2.25 + 1)) / 8)
    assert [line["matched"] for line in scores.lines] == [1, 1, 0, 0, 2, 2]
    assert scores.remarks == ["Figures that are published were read by Qwen2.5-VL-7B-Instruct."]
    record = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[2])
    assert record["read"] == ["SOAP"] and record["wanted"] == ["SOUP"] and record["picture"] == "1.png"
    assert json.loads((tmp_path / "results.json").read_text())["judge"] == "rapidocr"


def test_cvtg_from_pictures_to_figures(tmp_path):
    clip = ClipScorer(str(write_clip(tmp_path / "clip")))
    tested = suite(cvtg("Hotel", "SOUP"), clip=clip)
    scores = run(tested, tmp_path / "out")
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")) == [
        "CVTG/2/0.png",
        "CVTG/3/1.png",
    ]
    figures = {figure.name: figure for figure in scores.figures}
    assert list(figures) == [
        "word accuracy", "NED (1 = best)", "CLIPScore", "word accuracy, 2 areas", "word accuracy, 3 areas"
    ]  # fmt: skip
    assert figures["word accuracy"].value == 0.5
    assert figures["NED (1 = best)"].value == pytest.approx((1 + 1 - 1 / 4) / 2, abs=1e-5)  # soap for soup: 1 of 4
    assert [figures[f"word accuracy, {n} areas"].value for n in (2, 3)] == [1, 0]
    assert tested.judged_by == f"rapidocr, CLIPScore {tmp_path / 'clip'}"


def test_clip_score_is_that_of_transformers_clip_with_the_prefix(tmp_path):
    folder = str(write_clip(tmp_path))
    image = Image.new("RGB", (32, 32), (200, 30, 90))  # the model's own size: nothing is resized
    value = ClipScorer(folder).score(image, "a sign")
    model, words = load_clip(folder, "", "", torch.device("cpu")), load_tokenizer(folder, "", "")
    from transformers import CLIPImageProcessor

    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(image, return_tensors="pt").pixel_values
    tokens = words(["A photo depicts a sign"], return_tensors="pt")
    with torch.no_grad():
        cosine = model(pixel_values=pixels, **tokens)
    expected = torch.cosine_similarity(cosine.image_embeds, cosine.text_embeds).item()
    assert value == pytest.approx(2.5 * max(expected, 0), abs=2.5 * 1e-5)
    other = ClipScorer(folder).score(image, "another sign")
    assert other != value


def record(index: int, wanted: list[str], read: list[str], group: str = "2 areas", **more):
    return {"picture": f"{index}.png", "index": index, "wanted": wanted, "read": read, "group": group, **more}


def test_figures_are_over_words_and_clip_scores_over_pictures():
    scores = score_cvtg(
        [record(0, ["a", "bb", "cc"], ["A bb", "cd"], clip=0.5), record(1, ["zoo"], [], "3 areas", clip=1.0)]
    )
    accuracy, near, clip, two, three = scores.figures
    assert (accuracy.value, accuracy.count) == (0.5, 4)  # not (2/3 + 0) / 2
    assert near.value == pytest.approx((1 + 1 + 0.5 + 0) / 4, abs=1e-5)
    assert (clip.value, clip.count) == (0.75, 2)
    assert (two.value, three.value) == (pytest.approx(2 / 3), 0)
    chinese = score_longtext([record(0, ["每日新鲜"], ["每日"], "a"), record(1, ["烘焙"], ["焙"], "b")], "zh")
    assert [(f.name, f.value, f.of) for f in chinese.figures] == [
        ("text score (zh)", 0.5, "characters"),
        ("text score, a", 0.5, "characters"),
        ("text score, b", 0.5, "characters"),
    ]


def test_a_folder_of_pictures_is_judged_as_it_is_named_there(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    prompts = longtext("HOTEL", "MILK", "TAXI")
    for name, word in (("0_0", "HOTEL"), ("0_1", "MOTEL"), ("1", "MILK"), ("notes_7", "MILK")):
        signs([type("P", (), {"prompt": f'"{word}"'})])[0].save(images / f"{name}.png")
    tested = suite(prompts)
    assert [(p.path, p.index, p.samples) for p in tested.find(images)] == [
        ("0_0.png", 0, (0,)), ("0_1.png", 0, (1,)), ("1.png", 1, (0,)), ("2.png", 2, (0,)),
    ]  # fmt: skip
    scores = run(tested, tmp_path / "out", images)
    assert (scores.figures[0].value, scores.figures[0].count) == (pytest.approx(2 / 3), 3)
    assert "1 picture of 4 could not be judged" in scores.remarks[-1] and "2.png" in scores.remarks[-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no picture of these prompts, as 0.png would be"):
        tested.find(tmp_path / "empty")


def test_other_prompts_do_not_go_on_in_the_same_folder(tmp_path):
    run(suite(longtext("HOTEL")), tmp_path)
    with pytest.raises(EvaluationError, match="prompts: .* there, .* now"):
        judge(suite(longtext("MILK")), Place(tmp_path), WORLD)


def test_the_tiny_models_prompts_can_be_read():
    root = Path(__file__).parents[3] / "data" / "benchmarks"
    found = read_prompts(root / "text_tiny.jsonl")
    assert found.language == "en" and len(found.prompts) >= 60
    assert all(f'"{prompt.wanted[0]}"' in prompt.prompt for prompt in found.prompts)
