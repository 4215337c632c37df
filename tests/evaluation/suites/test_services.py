"""Judges behind an address: what is sent, what is checked, what is tried again."""

from __future__ import annotations

import base64
import io
import json
import socket

import numpy as np
import pytest
from PIL import Image

from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.evaluation.suites.services import HttpDetector
from tests.evaluation.suites.http_answers import Answers
from tests.reward_service import RawService


def png(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
DOG = {"class": "dog", "score": 0.75, "box": [0, 1, 3.5, 3]}
GOOD = (200, json.dumps({"detections": [DOG, {**DOG, "class": "cat"}]}))


def detector(url: str, retries: int = 2) -> HttpDetector:
    return HttpDetector(url, retries=retries, backoff_seconds=0)


def test_a_picture_goes_out_whole_and_what_was_not_asked_for_is_left_out():
    mask = np.zeros((3, 4), dtype=np.uint8)
    mask[1:, :2] = 255
    with Answers((200, json.dumps({"detections": [{**DOG, "mask": png(mask)}, {**DOG, "class": "cat"}]}))) as service:
        tested = detector(service.url)
        tested.check(["dog"])
        ((found,),) = tested.detect([PICTURE], ["dog", "tv"])
    (asked,) = service.asked
    sent = Image.open(io.BytesIO(base64.b64decode(asked["image"])))
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(PICTURE))
    assert asked["classes"] == ["dog", "tv"] and "POST /detect" in service.heads[0]
    assert (found.name, found.score, found.box) == ("dog", 0.75, (0, 1, 3.5, 3))
    np.testing.assert_array_equal(found.mask, mask > 0)


def test_answers_come_back_in_the_order_of_the_pictures():
    def width(asked: dict) -> str:
        size = Image.open(io.BytesIO(base64.b64decode(asked["image"]))).width
        return json.dumps({"detections": [{"class": "dog", "score": size / 100, "box": [0, 0, 1, 1]}]})

    with Answers(width) as service:
        found = detector(service.url).detect([Image.new("RGB", (w, 2)) for w in range(1, 30)], ["dog"])
    assert [one.score for (one,) in found] == [w / 100 for w in range(1, 30)]


def test_a_picture_that_the_service_cannot_judge_is_a_failure_with_its_reason():
    with Answers((200, '{"error": "too dark"}'), (200, "{}"), GOOD) as service:
        tested = detector(service.url)
        first = tested.detect([PICTURE], ["dog"])
        second = tested.detect([PICTURE], ["dog"])
    assert first == [Failure(f"{service.url}: too dark")]
    assert second == [Failure(f"{service.url}: neither `detections` nor an `error`")]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("{", "not as agreed"),
        ("[]", "not as agreed"),
        ('{"detections": [{"class": "dog", "score": 1.5, "box": [0, 0, 1, 1]}]}', "detections.0"),
        ('{"detections": [{"class": "dog", "score": "1", "box": [0, 0, 1, 1]}]}', "detections.0"),
        ('{"detections": [{"class": "dog", "score": 0.5, "box": [0, 0, 1]}]}', "detections.0"),
        ('{"detections": [{"class": "dog", "score": NaN, "box": [0, 0, 1, 1]}]}', "not as agreed"),
        ('{"detections": [{"class": "dog", "score": 0.5, "box": [2, 0, 1, 1]}]}', "ends before it begins"),
        ('{"detections": [{"class": "dog", "score": 0.5, "box": [0, 0, 1, 1], "mask": "no"}]}', "is no PNG in base64"),
        (
            json.dumps({"detections": [{**DOG, "mask": png(np.zeros((4, 4), dtype=np.uint8))}]}),
            "has 4 x 4 px for a picture of 4 x 3",
        ),
    ],
)
def test_an_answer_that_is_not_as_agreed_is_asked_for_again_and_then_quoted(answer, said):
    with Answers((200, answer), (503, "busy"), GOOD) as service:
        ((found,),) = detector(service.url).detect([PICTURE], ["dog"])
        assert found.score == 0.75 and len(service.asked) == 3
    with Answers((200, answer)) as service, pytest.raises(EvaluationError) as raised:
        detector(service.url, retries=1).detect([PICTURE], ["dog"])
    told = str(raised.value)
    assert said in told and "2 attempts" in told and "--detector" in told and "reward" not in told
    assert "running the same command again goes on" in told


def test_a_service_that_refuses_is_not_asked_again():
    with Answers((401, "who?")) as service, pytest.raises(EvaluationError, match="refuses.*--token-variable.*who?"):
        detector(service.url).detect([PICTURE], ["dog"])
    assert len(service.asked) == 1


def test_a_service_that_is_not_there_is_told_before_anything_is_drawn():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EvaluationError, match=rf"--detector: http://127.0.0.1:{port}/health does not answer"):
        detector(f"http://127.0.0.1:{port}").check(["dog"])


def test_an_address_with_a_login_is_refused_and_not_repeated():
    with pytest.raises(EvaluationError, match="--detector: an address is http") as raised:
        HttpDetector("http://me:secret@host")
    assert "secret" not in str(raised.value)


def test_a_token_goes_out_and_is_not_repeated(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "tok-123456")
    with Answers((400, "no good: tok-123456")) as service:
        tested = HttpDetector(service.url, token="JUDGE_TOKEN")
        with pytest.raises(EvaluationError) as raised:
            tested.detect([PICTURE], ["dog"])
    assert "Bearer tok-123456" in service.heads[0] and "tok-123456" not in str(raised.value)


def test_a_flood_is_cut_off():
    def flood(service: RawService, connection: socket.socket) -> None:
        service.send(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while True:
            service.send(connection, b"[" * 65536)

    with RawService(flood) as service, pytest.raises(EvaluationError, match="more than 16 MiB"):
        detector(service.url, retries=0).detect([PICTURE], ["dog"])
