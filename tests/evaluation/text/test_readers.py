"""Readers behind one interface: OCR on real pictures, a chat endpoint and a service with every answer they may give."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.evaluation.text.readers import QUESTION, ChatReader, HttpReader, OcrReader, reader
from tests.evaluation.suites.http_answers import Answers

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))


def sign(*lines: str) -> Image.Image:
    image = Image.new("RGB", (220, 160), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 20 + 60 * row), line, "black", ImageFont.load_default(size=36))
    return image


def is_the_picture(text: str) -> bool:
    return np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), np.asarray(PICTURE))


def answer(content: object, **more: object) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content, **more}, "index": 0}]})


def chat(url: str) -> ChatReader:
    return ChatReader(f"openai:some/model@{url}/v1", retries=2, backoff_seconds=0)


def test_ocr_reads_pictures_of_any_size_in_order():
    engine = OcrReader("rapidocr", "en")
    engine.check()
    small = sign("MILK").crop((0, 0, 200, 80))
    assert engine.read([sign("HOTEL", "OPEN"), small, Image.new("RGB", (64, 64), "white")]) == [
        ["HOTEL", "OPEN"],
        ["MILK"],
        [],
    ]


def test_a_picture_that_the_engine_fails_on_is_a_failure_and_not_an_empty_reading():
    (found,) = OcrReader("rapidocr", "en").read([Image.new("RGB", (4000, 1))])
    assert isinstance(found, Failure) and "4000x1" in found.reason


def test_an_engine_that_is_not_here_is_told_in_the_words_of_the_command(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EvaluationError) as told:
        OcrReader("pytesseract", "zh").check()
    assert "--reader: engine pytesseract lacks" in str(told.value) and "reward.options" not in str(told.value)


def test_a_chat_endpoint_is_asked_with_the_picture():
    with Answers((200, answer("FRESH\n\nBREWS\n"))) as service:
        tested = chat(service.url)
        tested.check()
        assert tested.read([PICTURE]) == [["FRESH", "BREWS"]]
    (asked,) = service.asked
    (message,) = asked["messages"]
    picture, question = message["content"]
    assert "POST /v1/chat/completions" in service.heads[0] and asked["model"] == "some/model"
    assert message["role"] == "user" and asked["temperature"] == 0 and asked["max_tokens"] == 1024
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and is_the_picture(data)
    assert question == {"type": "text", "text": QUESTION}
    assert tested.name == f"some/model at {service.url}/v1"


@pytest.mark.parametrize("said", ["No text recognized", " no text recognized.\n", ""])
def test_the_sentence_for_nothing_is_no_text(said):
    with Answers((200, answer(said))) as service:
        assert chat(service.url).read([PICTURE]) == [[]]


def test_answers_are_in_the_order_of_the_pictures():
    def width(asked: dict) -> str:
        data = asked["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
        return answer(str(Image.open(io.BytesIO(base64.b64decode(data))).width))

    with Answers(width) as service:
        found = chat(service.url).read([Image.new("RGB", (w, 2)) for w in range(1, 20)])
    assert found == [[str(w)] for w in range(1, 20)]


def test_a_refusal_is_a_failure_and_a_broken_answer_is_asked_for_again():
    with Answers((200, answer(None, refusal="cannot help")), (200, '{"choices": []}'), (200, answer("A"))) as service:
        tested = chat(service.url)
        assert tested.read([PICTURE]) == [Failure("--reader: cannot help")]
        assert tested.read([PICTURE]) == [["A"]]
    assert len(service.asked) == 3
    with Answers((200, answer(["A"]))) as service, pytest.raises(EvaluationError, match="no usable answer in 3"):
        chat(service.url).read([PICTURE])


def test_a_service_reads():
    with Answers((200, '{"lines": ["A", "B"]}'), (200, '{"error": "too dark"}'), (200, "{}")) as service:
        tested = HttpReader(service.url, retries=0)
        tested.check()
        found = [tested.read([PICTURE])[0] for _ in range(3)]
    assert found[0] == ["A", "B"] and is_the_picture(service.asked[0]["image"])
    assert found[1:] == [Failure(f"{service.url}: {why}") for why in ("too dark", "neither `lines` nor an `error`")]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("rapidocr", OcrReader), ("openai:m@http://host/v1", ChatReader), ("http://host:8000", HttpReader)],
)
def test_readers_by_name(spec, kind):
    assert isinstance(reader(spec, "en", None), kind)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("easyocr", "write rapidocr, pytesseract, openai:MODEL@ADDRESS or http"),
        ("openai:http://host/v1", "write openai:MODEL@ADDRESS"),
        ("openai:m@host", r"an address is http\(s\)://"),
    ],
)
def test_a_reader_that_there_is_not(spec, said):
    with pytest.raises(EvaluationError, match=f"--reader.*{said}"):
        reader(spec, "en", None)
