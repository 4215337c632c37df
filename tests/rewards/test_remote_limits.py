"""Remote rewards against servers that hang, flood, send bombs or repeat secrets: each test talks to a real socket."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import quote

import pytest
import torch

from glm_training.rewards import (
    RemoteOptions,
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardOptions,
    RewardServiceError,
    ScoringStopped,
)
from glm_training.rewards.exchange import LARGEST_ANSWER
from glm_training.rewards.foreign import SHOWN, shown
from glm_training.rewards.types import LARGEST_SCORE
from tests.reward_service import RawService

Answer = Callable[[RawService, socket.socket], None]


def whole(body: bytes, status: str = "200 OK", headers: str = "") -> Answer:
    """Answers with `body`, and closes."""

    def answer(service: RawService, connection: socket.socket) -> None:
        service.send(connection, f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    return answer


def scores(*values: object, **more: object) -> Answer:
    return whole(json.dumps({"scores": values, **more}).encode())


def endless(start: bytes, piece: bytes, pause: float) -> Answer:
    """`start`, and then `piece` again and again."""

    def answer(service: RawService, connection: socket.socket) -> None:
        service.send(connection, start)
        while not service.over.wait(pause):
            service.send(connection, piece)

    return answer


def hang(service: RawService, connection: socket.socket) -> None:
    service.over.wait(30)


OK = b"HTTP/1.1 200 OK\r\n"
HANGS = {
    "says nothing": hang,
    "a byte of the head now and then": endless(OK + b"X: ", b"x", 0.02),
    "a byte of the body now and then": endless(OK + b"Content-Length: 100000\r\n\r\n", b" ", 0.02),
    "chunks without an end": endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.02),
}


def calculator_of(service: RawService, on_error: str = "error", **options: object) -> RewardCalculator:
    settings = RemoteOptions(service.url, **{"retries": 0, "timeout_seconds": 20, "backoff_seconds": 0.01, **options})
    return RewardCalculator({"remote/judge": 1}, options=RewardOptions(remote={"judge": settings}, on_error=on_error))


def grey(count: int = 1, stopped: Callable[[], bool] = lambda: False) -> RewardBatch:
    return RewardBatch(torch.zeros(count, 3, 8, 8), ["grey"] * count, stopped=stopped)


def what_is_said(answer: Answer, count: int = 1, **options: object) -> str:
    with RawService(answer) as service, pytest.raises(RewardServiceError) as caught:
        calculator_of(service, **options).compute_rewards(grey(count))
    return str(caught.value)


def request_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reward-request"]


@pytest.mark.parametrize("kind", HANGS)
def test_an_answer_has_a_deadline_from_first_byte_to_last(kind: str) -> None:
    started = time.monotonic()
    with RawService(HANGS[kind]) as service:
        with pytest.raises(RewardServiceError, match=r"in 2 attempts.*(nothing|bytes of an answer) within 0\.4 s"):
            calculator_of(service, timeout_seconds=0.4, retries=1).compute_rewards(grey())
        assert time.monotonic() - started < 4
        for thread in request_threads():  # the connection was cut: no thread is left with the server
            thread.join(3)
            assert not thread.is_alive()


@pytest.mark.parametrize("kind", HANGS)
def test_a_stop_is_heeded_while_a_server_hangs(kind: str) -> None:
    with RawService(HANGS[kind]) as service:
        calculator = calculator_of(service)
        started = time.monotonic()
        with pytest.raises(ScoringStopped):
            calculator.compute_rewards(grey(stopped=service.asked.is_set))
        assert time.monotonic() - started < 4
        assert all(thread.daemon for thread in request_threads())


def test_a_stop_is_heeded_between_attempts() -> None:
    with RawService(whole(b"busy", "503 Busy")) as service:
        started = time.monotonic()
        with pytest.raises(ScoringStopped):
            calculator_of(service, retries=3, backoff_seconds=30).compute_rewards(grey(stopped=service.asked.is_set))
        assert time.monotonic() - started < 4


def test_a_slow_request_holds_up_no_other() -> None:
    """The first request hangs until its deadline and is then asked again; the others are answered meanwhile."""
    asked = []

    def answer(service: RawService, connection: socket.socket) -> None:
        asked.append(time.monotonic())
        (hang if len(asked) == 1 else scores(0.5))(service, connection)

    with RawService(answer) as service:
        settings = {"batch_size": 1, "concurrent_requests": 2, "timeout_seconds": 1.5, "retries": 1}
        result = calculator_of(service, **settings).compute_rewards(grey(4))
    assert result.total.tolist() == [0.5] * 4 and len(asked) == 5
    assert asked[3] - asked[0] < 1.2 and asked[4] - asked[0] >= 1.4


def test_a_server_that_hangs_at_the_start_is_told() -> None:
    with (
        RawService(hang, healthy=False) as service,
        pytest.raises(RewardBackendError, match=r"nothing within 0\.3 s.*Start the"),
    ):
        calculator_of(service, timeout_seconds=0.3).check()


@pytest.mark.parametrize(
    ("status", "cause", "limit"),
    [("200 OK", "an answer of more than 16 MiB", LARGEST_ANSWER), ("500 Broken", "HTTP 500: aaaa", 1 << 20)],
)
def test_no_more_is_read_than_an_answer_can_need(status: str, cause: str, limit: int) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: 3000000000\r\n\r\n".encode()
    with RawService(endless(head, b"a" * 65536, 0)) as service:
        with pytest.raises(RewardServiceError) as caught:
            calculator_of(service).compute_rewards(grey())
        assert cause in str(caught.value) and len(str(caught.value)) < 1000
        assert service.sent < limit + 32 * 2**20  # what lies in the sockets' buffers


def test_decompressed_bytes_are_those_that_count() -> None:
    bomb = gzip.compress(b'{"scores": [' + b" " * (64 * 2**20))
    assert len(bomb) < 2**17
    assert "an answer of more than 16 MiB" in what_is_said(whole(bomb, headers="Content-Encoding: gzip\r\n"))
    said = what_is_said(whole(bomb, "500 Broken", "Content-Encoding: gzip\r\n"))
    assert "HTTP 500" in said and len(said) < 1000


def test_a_compressed_answer_is_understood() -> None:
    body = gzip.compress(b'{"scores": [0.25]}')
    with RawService(whole(body, headers="Content-Encoding: gzip\r\n")) as service:
        assert calculator_of(service).compute_rewards(grey()).total.tolist() == [0.25]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("1e300", "`scores.1` is 1e+300: fp32 holds no more than 3.4e+38"),
        ("-1e39", "`scores.1` is -1e+39: fp32 holds no more than 3.4e+38"),
        ("1" + "0" * 400, "`scores.1` is"),
        ("1e400", "`scores.1` is inf: Input should be a finite number"),
        ("NaN", "`scores.1` is nan: Input should be a finite number"),
        ("true", "`scores.1` is True: Input should be a valid number"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        ('{"a":' * 100_000, "Invalid JSON: recursion limit exceeded"),
        ("0]}x", "Invalid JSON: trailing characters"),
        ('"\ud800"', "Invalid JSON"),
        ('"0.5",' * 1_000_000 + "1", "`scores.1` is '0.5': Input should be a valid number"),
    ],
    ids=lambda value: value[:12],
)
def test_scores_are_numbers_that_fp32_can_hold(value: str, cause: str) -> None:
    body = f'{{"scores": [0.5, {value}]}}'.encode("utf-8", "surrogatepass")
    started = time.monotonic()
    said = what_is_said(whole(body), 2)
    assert cause in said and len(said) < 1000
    assert time.monotonic() - started < 5


def test_the_largest_score_of_fp32_is_one() -> None:
    with RawService(scores(LARGEST_SCORE, -LARGEST_SCORE, 1e-60)) as service:
        result = calculator_of(service).compute_rewards(grey(3))
    assert result.total.tolist() == [LARGEST_SCORE, -LARGEST_SCORE, 0.0]


@pytest.mark.parametrize("garbage", [b"\x00\xff" * 1000, b"HTTP/1.1 abc\r\n\r\n", OK + b"X: " + b"x" * 300_000])
def test_what_is_no_http_is_told_and_no_traceback(garbage: bytes) -> None:
    said = what_is_said(lambda service, connection: service.send(connection, garbage))
    assert "ProtocolError" in said and len(said) < 1000


TOKEN = 'Open"Sesame/7 äöü'.replace(" äöü", "+x") * 2  # long enough to be recognised, with what JSON and URLs escape
ECHOES: dict[str, Answer] = {
    "a server error": whole(f"bad token {TOKEN}".encode(), "500 Broken"),
    "a refusal": whole(f"who is Bearer {TOKEN}?".encode(), "403 No"),
    "a redirect": whole(b"", "302 There", f"Location: http://elsewhere/?t={quote(TOKEN, safe='')}\r\n"),
    "a redirect as it is": whole(b"", "302 There", f"Location: http://elsewhere/{TOKEN}\r\n"),
    "JSON that escapes it": whole(json.dumps({"authorization": TOKEN}).encode()),
    "a score": scores(TOKEN),
    "no JSON": whole(f"<html>{TOKEN}".encode()),
    "across the cut": whole(b"a" * (SHOWN - 8) + TOKEN.encode(), "500 Broken"),
    "many of them": whole(f"{TOKEN} ".encode() * 2000, "500 Broken"),
}


@pytest.mark.parametrize("kind", ECHOES)
def test_an_echoed_token_is_masked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", TOKEN)  # a name that says nothing of a secret
    said = what_is_said(ECHOES[kind], token_variable="JUDGE")
    assert "***" in said or kind == "across the cut"
    for form in (TOKEN, quote(TOKEN, safe=""), json.dumps(TOKEN)[1:-1]):
        assert form[:8] not in said
    assert "\n" not in said and len(said) < 1000


def test_a_reason_of_a_sample_is_cut_and_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", TOKEN)
    reason = f"\x1b[31mno face, {TOKEN}\n" + "b" * 8_000_000
    with RawService(scores(None, 0.5, errors=[reason, None])) as service:
        result = calculator_of(service, "skip", token_variable="JUDGE").compute_rewards(grey(2))
    assert result.total[1] == 0.5 and result.failures.keys() == {0}
    assert "/score: [31mno face, *** bbb" in result.failures[0] and "characters)" in result.failures[0]
    assert len(result.failures[0]) < 600


def test_an_echo_at_the_start_is_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", TOKEN)
    with RawService(ECHOES["a refusal"], healthy=False) as service, pytest.raises(RewardBackendError) as caught:
        calculator_of(service, token_variable="JUDGE").check()
    assert "HTTP 403: who is Bearer ***?" in str(caught.value)


@pytest.mark.parametrize(("token", "words"), [("a\nb", "characters that a token cannot have"), ("ä", "characters")])
def test_a_token_that_no_header_can_carry(token: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", token)
    with RawService(hang, healthy=False) as service, pytest.raises(RewardBackendError, match=words):
        calculator_of(service, token_variable="JUDGE").check()


def test_what_looks_like_a_secret_is_masked_before_it_is_cut() -> None:
    assert shown("http://me:hunter22@host/ down") == "http://***@host/ down"
    assert shown("password=" + "x" * 50, 12) == "password=***"
    assert shown("abc" * 200, 5) == "abcab... (600 characters)"
