"""Remote rewards: what is sent, what is retried, what is refused, and the reference server in examples/."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.reward_server import RewardServer
from glm_training.config.sections.reward_options import RemoteRewardConfig
from glm_training.rewards import (
    RemoteOptions,
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardOptions,
    RewardSampleError,
    RewardServiceError,
    build_calculator,
)
from tests.reward_service import FaultyService

ROOT = Path(__file__).parents[2]


@pytest.fixture
def service() -> Iterator[FaultyService]:
    with FaultyService() as service:
        yield service


def remote(service: FaultyService, on_error: str = "error", **options) -> RewardCalculator:
    settings = RemoteOptions(service.url, **{"backoff_seconds": 0.01, "retries": 2, "timeout_seconds": 5, **options})
    return RewardCalculator({"remote/judge": 1}, options=RewardOptions(remote={"judge": settings}, on_error=on_error))


def batch_of(count: int, **more: torch.Tensor) -> RewardBatch:
    """Grey pictures, brighter one by one."""
    levels = torch.arange(count, dtype=torch.float32) * 10 / 255
    return RewardBatch(
        levels[:, None, None, None].expand(-1, 3, 8, 8), [f"number {row}" for row in range(count)], **more
    )


@pytest.mark.parametrize("concurrent", [1, 4])
def test_scores_come_back_in_order(service: FaultyService, concurrent: int) -> None:
    service.delays = [0.2, 0.0, 0.1, 0.0]  # the first request is answered last
    calculator = remote(service, batch_size=3, concurrent_requests=concurrent)
    calculator.check()
    result = calculator.compute_rewards(batch_of(10))
    torch.testing.assert_close(result.components["remote/judge"], torch.arange(10) * 10 / 255)
    assert sorted(len(request["samples"]) for request in service.requests) == [1, 3, 3, 3]
    assert (service.most_at_once == 1) == (concurrent == 1)


def test_what_is_sent(service: FaultyService, noise: torch.Tensor) -> None:
    batch = RewardBatch(noise, ["a 'cat'\n猫"], targets=1 - noise, sources=noise / 2)
    remote(service).compute_rewards(batch)
    assert set(service.requests[0]["samples"][0]) == {"prompt", "image"}
    remote(service, send=("target", "source")).compute_rewards(batch)
    (sample,) = service.requests[1]["samples"]
    assert sample["prompt"] == "a 'cat'\n猫"
    for name, expected in (("image", noise), ("target", 1 - noise), ("source", noise / 2)):
        image = Image.open(io.BytesIO(base64.b64decode(sample[name])))
        assert image.format == "PNG"
        pixels = torch.tensor(list(image.tobytes())).view(128, 128, 3).permute(2, 0, 1)
        assert (pixels == (expected[0] * 255).round()).all()


def test_a_reward_that_needs_images_says_so(service: FaultyService) -> None:
    report = remote(service, send=("target",)).check_prompts(["a", "b"], has_targets=False, has_sources=False)
    assert any("remote/judge needs a target image" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", "HTTP 500: out of memory"),
        ("429", "HTTP 429"),
        ("slow", "nothing within 0.3 s"),
        ("hang up", "RemoteProtocolError"),
        ("malformed", "Invalid JSON: EOF while parsing"),
        ("not an object", "Input should be an object"),
        ("missing", "Field required"),
        ("text", "`scores.0` is '0.5': Input should be a valid number"),
        ("nan", "`scores.0` is nan: Input should be a finite number"),
        ("too few", "an answer with 2 scores for 3 samples"),
    ],
)
def test_a_fault_is_retried_and_then_named(service: FaultyService, fault: str, cause: str) -> None:
    calculator = remote(service, timeout_seconds=0.3)
    service.faults = [fault, fault]
    assert calculator.compute_rewards(batch_of(3)).total.isfinite().all()
    assert len(service.requests) == 3
    service.faults = [fault] * 3
    with pytest.raises(RewardServiceError) as caught:
        calculator.compute_rewards(batch_of(3))
    message = str(caught.value)
    assert len(service.requests) == 6
    assert cause in message
    assert f"{service.url}/score gave no usable answer in 3 attempts" in message
    assert "reward.options.remote.judge.timeout_seconds" in message


def test_the_wait_doubles(service: FaultyService) -> None:
    service.faults = ["500"] * 3
    started = time.monotonic()
    remote(service, retries=3, backoff_seconds=0.1).compute_rewards(batch_of(1))
    assert 0.7 <= time.monotonic() - started < 5


@pytest.mark.parametrize("fault", ["400", "401", "redirect"])
def test_a_refusal_is_not_asked_again(service: FaultyService, fault: str) -> None:
    service.faults = [fault]
    with pytest.raises(RewardServiceError) as caught:
        remote(service).compute_rewards(batch_of(2))
    expected = {"400": "HTTP 400: bad sample", "401": "token_variable", "redirect": "HTTP 302 to http://elsewhere/"}
    assert expected[fault] in str(caught.value) and len(service.requests) == 1


def test_one_failed_request_ends_the_others_retries(service: FaultyService) -> None:
    service.faults = ["400", *["500"] * 20]
    started = time.monotonic()
    with pytest.raises(RewardServiceError, match="HTTP 400"):
        remote(service, batch_size=1, concurrent_requests=2, retries=5, backoff_seconds=1).compute_rewards(batch_of(2))
    assert time.monotonic() - started < 10, "the other request would have waited 31 s"


def test_samples_without_a_score_are_failures_of_their_own(service: FaultyService) -> None:
    service.faults = ["null"]
    result = remote(service, on_error="skip").compute_rewards(batch_of(3))
    assert result.total.isnan().tolist() == [True, False, False]
    assert "blurred beyond reading" in result.failures[0]
    service.faults = ["null"]
    with pytest.raises(RewardSampleError, match="blurred beyond reading"):
        remote(service).compute_rewards(batch_of(3))


def test_a_wrong_address_is_found_at_the_start(service: FaultyService) -> None:
    wrong = RemoteOptions(f"{service.url}/elsewhere")
    calculator = RewardCalculator({"remote/judge": 1}, options=RewardOptions(remote={"judge": wrong}))
    with pytest.raises(RewardBackendError, match="HTTP 404.*reward.options.remote.judge.url"):
        calculator.check()
    with FaultyService() as other:
        gone = remote(other)
    with pytest.raises(RewardBackendError, match="ConnectError.*Start the server"):
        gone.check()


def test_the_token_comes_from_the_environment(service: FaultyService, monkeypatch: pytest.MonkeyPatch) -> None:
    calculator = remote(service, token_variable="JUDGE_TOKEN")
    with pytest.raises(RewardBackendError, match="JUDGE_TOKEN is not set"):
        calculator.check()
    monkeypatch.setenv("JUDGE_TOKEN", "abc123")
    calculator.check()
    calculator.compute_rewards(batch_of(1))
    assert service.tokens == ["Bearer abc123"]


@pytest.mark.parametrize("url", ["http://me:secret@host", "http://host/?key=secret", "ftp://host", "host:80"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RewardConfigError) as caught:
        RemoteOptions(url)
    assert "secret" not in str(caught.value)


def test_an_unknown_remote_reward_is_refused(service: FaultyService) -> None:
    options = RewardOptions(remote={"judge": RemoteOptions(service.url)})
    with pytest.raises(RewardConfigError, match="did you mean 'remote/judge'"):
        RewardCalculator({"remote/juge": 1}, options=options)


def test_the_docs_name_every_option() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in RemoteRewardConfig.model_fields)


@pytest.fixture
def colour_server() -> Iterator[RewardServer]:
    """The reference server with the reward of examples/custom_reward.py, as its command line builds it."""
    spec = f"{ROOT / 'examples' / 'custom_reward.py'}:NamedColour"
    calculator = build_calculator(spec, {}, RewardOptions(on_error="skip"))
    with RewardServer(("127.0.0.1", 0), calculator, token="opensesame") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_reference_server_scores_as_the_calculator_does(
    colour_server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "opensesame")
    options = RemoteOptions(f"http://127.0.0.1:{colour_server.server_port}/", token_variable="REWARD_TOKEN")
    settings = RewardOptions(remote={"colour": options}, on_error="skip")
    calculator = RewardCalculator({"remote/colour": 1}, options=settings)
    calculator.check()
    images = torch.zeros(3, 3, 16, 16)
    images[:, 0, :, :4] = 1
    batch = RewardBatch(images, ["a red door", "a black door", "a door"])
    result = calculator.compute_rewards(batch)
    assert result.total[:2].tolist() == [0.25, 0.75]
    assert "names none of red" in result.failures[2]


@pytest.mark.parametrize(
    ("body", "token", "code", "words"),
    [
        (b"{", "opensesame", 400, "the body must be"),
        (json.dumps({"samples": [{"prompt": "a", "image": "????"}]}).encode(), "opensesame", 400, "PNG in base64"),
        (b"{}", "wrong", 401, "token"),
    ],
)
def test_the_reference_server_refuses(
    colour_server: RewardServer, body: bytes, token: str, code: int, words: str
) -> None:
    import httpx2

    url = f"http://127.0.0.1:{colour_server.server_port}/score"
    response = httpx2.post(url, content=body, headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert response.status_code == code and words in response.text
