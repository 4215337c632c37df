"""Text accuracy: the scoring rule in closed form, and the OCR engines behind it."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rapidocr
import torch

from glm_training.rewards import (
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardOptions,
    RewardSampleError,
    TextAccuracyOptions,
    read_texts,
    word_accuracy,
)
from glm_training.rewards.ocr import RapidOcrReader, load_reader
from glm_training.rewards.quoted_text import quoted_text
from glm_training.rewards.text_accuracy import TextAccuracy, prefix_distances, score_lines, word_score

Draw = Callable[..., torch.Tensor]


def table_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def test_bit_parallel_distances_equal_the_table() -> None:
    rng = random.Random(0)
    for _ in range(200):
        left, right = ("".join(rng.choices("abc", k=rng.randint(0, 90))) for _ in range(2))
        expected = [table_distance(left, right[:stop]) for stop in range(0, len(right) + 1, 7)]
        assert prefix_distances(left, right)[::7] == expected


@pytest.mark.parametrize(
    ("spans", "lines", "score"),
    [
        (["OPEN"], ["OPEN"], 1.0),
        (["OPEN"], ["open"], 1.0),
        (["ＯＰＥＮ"], ["OPEN"], 1.0),
        (["GRAND OPENING"], ["GRANDOPENING"], 1.0),
        (["GRAND OPENING"], ["GRAND", "OPENING"], 1.0),
        (["don’t"], ["don't"], 1.0),
        (["OPEN"], ["OPFN"], 0.75),
        (["OPEN"], ["OPENN"], 0.75),
        (["OPEN"], [], 0.0),
        (["OPEN"], ["zzzzzzzz"], 0.0),
        (["ONE", "TWO"], ["ONE"], 0.5),
        (["ONE", "ONE"], ["ONE"], 0.5),
        (["ONE", "TWO"], ["ONE TWO"], 1.0),
        (["ONE", "ONE TWO"], ["ONE TWO", "ONE"], 1.0),
        (["OPEN"], ["OPEN", "SALE"], 1 - 0.2 * 4 / 4),
        (["OPEN"], ["SALE OPEN AT"], 1 - 0.2 * 6 / 4),
        (["OPEN"], ["OPEN"] * 7, 0.0),
        (["OPEN"], ["xOPENx"], 0.5),
    ],
)
def test_score_in_closed_form(spans: list[str], lines: list[str], score: float) -> None:
    assert score_lines(spans, lines, extra_text_penalty=0.2) == pytest.approx(score)


def test_penalty_weight_is_obeyed() -> None:
    assert score_lines(["OPEN"], ["OPEN", "NO"], 0.0) == 1.0
    assert score_lines(["OPEN"], ["OPEN", "NO"], 0.5) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("spans", "lines", "score"),
    [
        (["GRAND OPENING"], ["GRAND OPENINC"], 0.5),
        (["GRAND OPENING"], ["GRANDOPENING"], 1.0),
        (["NO", "NO"], ["NO"], 0.5),
        (["ONE TWO", "THREE"], ["THREE", "TWO", "ONE"], 1.0),
        (["OPEN"], ["OPENS"], 0.0),
    ],
)
def test_word_score(spans: list[str], lines: list[str], score: float) -> None:
    assert word_score(spans, lines) == score


def test_reads_rendered_words(draw_sign: Draw) -> None:
    words = ["OPEN", "Pizza", "24", "BAKERY", "music", "EXIT"]
    colours = [("black", "white"), ("white", "blue"), ("yellow", "green"), ("navy", "orange")]
    images = torch.stack([draw_sign(word, ink=ink, paper=paper) for word in words for ink, paper in colours])
    expected = [[word] for word in words for _ in colours]
    wrong = [pair for pair in zip(read_texts(images), expected, strict=True) if pair[0] != pair[1]]
    assert len(wrong) <= 1, wrong


def test_an_unsure_reading_is_left_out(draw_sign: Draw) -> None:
    sign = draw_sign("OPEN")[None]
    assert read_texts(sign, TextAccuracyOptions(min_confidence=0.5)) == [["OPEN"]]
    assert read_texts(sign, TextAccuracyOptions(min_confidence=1.0)) == [[]]


def test_reads_two_lines_and_large_images(draw_sign: Draw) -> None:
    assert read_texts(draw_sign("FRESH", "BREAD")[None]) == [["FRESH", "BREAD"]]
    assert read_texts(draw_sign("HELLO", "WORLD", side=1024)[None]) == [["HELLO", "WORLD"]]


def test_a_reading_does_not_depend_on_the_batch(draw_sign: Draw, noise: torch.Tensor) -> None:
    images = torch.stack([draw_sign("OPEN"), draw_sign("A LONG", "SENTENCE"), noise[0], draw_sign("tea", paper="red")])
    images = (images + 0.3 * noise).clamp(0, 1)
    assert read_texts(images) == [read_texts(image[None])[0] for image in images]


def test_metric_and_word_accuracy_on_images(draw_sign: Draw) -> None:
    images = torch.stack([draw_sign("OPEN"), draw_sign("OPEN"), draw_sign("OPEN", "SALE"), draw_sign("OPEN")])
    prompts = ['a sign "OPEN"', 'a sign "SHUT"', 'a sign "OPEN"', "the shop's open sign"]
    result = RewardCalculator({"text_accuracy": 1, CONSTANT: 0.0}).compute_rewards(RewardBatch(images[:3], prompts[:3]))
    right, wrong, extra = result.components["text_accuracy"].tolist()
    assert right == 1.0
    assert wrong < 0.3
    assert extra == pytest.approx(0.8)
    accuracy = word_accuracy(images, prompts)
    assert accuracy[:3].tolist() == [1.0, 0.0, 1.0]
    assert accuracy[3].isnan()


CONSTANT = f"{__file__}:ConstantReward"


class ConstantReward(RewardCalculator):
    """Applies to everything."""

    def compute_reward(self, generated_image: object, target_image: object, prompt: str) -> float:
        return 0.5


@pytest.mark.parametrize("nothing", ["\u200b", "\u202e\u202c", "\ufe0f", "\u00ad \u2060"])
def test_a_quotation_in_which_nothing_is_seen_asks_for_nothing(nothing: str) -> None:
    assert quoted_text(f'a sign "{nothing}" and "OPEN"') == ["OPEN"]
    assert not TextAccuracy(TextAccuracyOptions()).applies(f'a sign "{nothing}"', False, False)


def test_unquoted_prompts_leave_the_metric_out(draw_sign: Draw) -> None:
    batch = RewardBatch(draw_sign("OPEN").expand(2, -1, -1, -1), ['a sign "OPEN"', "a sign that isn't quoted"])
    result = RewardCalculator({"text_accuracy": 3.0, CONSTANT: 1.0}).compute_rewards(batch)
    assert result.components["text_accuracy"].isnan().tolist() == [False, True]
    assert result.total.tolist() == pytest.approx([(3 * 1.0 + 0.5) / 4, 0.5])


def test_rapidocr_needs_no_network(monkeypatch: pytest.MonkeyPatch, draw_sign: Draw) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the OCR engine opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    reader = RapidOcrReader(TextAccuracyOptions())
    pixels = (draw_sign("OPEN").permute(1, 2, 0) * 255).byte().numpy()
    assert reader.read(pixels) == ["OPEN"]


def test_a_wheel_without_models_is_refused_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(RewardBackendError, match="no PP-OCR.*pip install"):
        RapidOcrReader(TextAccuracyOptions())


def test_an_unread_language_is_refused_with_a_remedy() -> None:
    with pytest.raises(RewardBackendError, match="language 'klingon' of .*languages; it has .*devanagari.*, ru,"):
        load_reader(TextAccuracyOptions(languages=("ch", "klingon")))


def test_missing_tesseract_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    calculator = RewardCalculator(
        {"text_accuracy": 1}, options=RewardOptions(text_accuracy=TextAccuracyOptions(engine="pytesseract"))
    )
    with pytest.raises(RewardBackendError) as caught:
        calculator.check()
    assert "pip install 'glm_training[pytesseract]'" in str(caught.value)
    assert "apt-get install tesseract-ocr" in str(caught.value)


def test_an_engine_failure_is_an_error_never_a_score(monkeypatch: pytest.MonkeyPatch, draw_sign: Draw) -> None:
    def fail(self: RapidOcrReader, pixels: object) -> list[str]:
        raise RewardSampleError("the engine broke")

    monkeypatch.setattr(RapidOcrReader, "read", fail)
    batch = RewardBatch(draw_sign("OPEN")[None], ['a sign "OPEN"'])
    with pytest.raises(RewardSampleError, match="sample 0.*text_accuracy: the engine broke"):
        RewardCalculator({"text_accuracy": 1}).compute_rewards(batch)
    skipping = RewardCalculator({"text_accuracy": 1}, options=RewardOptions(on_error="skip")).compute_rewards(batch)
    assert skipping.skipped == 1 and skipping.total.isnan().all()


def test_an_image_the_detector_refuses_is_a_sample_error() -> None:
    with pytest.raises(RewardSampleError, match="1024x8"):
        read_texts(torch.ones(1, 3, 8, 1024))


@pytest.mark.parametrize(
    "options", [{"engine": "easyocr"}, {"extra_text_penalty": -1.0}, {"min_confidence": 1.5}], ids=str
)
def test_bad_options_name_their_key(options: dict) -> None:
    with pytest.raises(RewardConfigError, match=f"reward.options.text_accuracy.{next(iter(options))}"):
        TextAccuracyOptions(**options)


def test_a_reader_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    code = "from glm_training.rewards.ocr import *; load_reader(TextAccuracyOptions())"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path)}, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
