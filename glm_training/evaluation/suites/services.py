"""Judges that are services over HTTP: a detector of objects.

    GET  {url}/health -> any 2xx
    POST {url}/detect
         {"image": "<PNG, base64>", "classes": ["bench", "dog"]}
      -> {"detections": [{"class": "bench", "score": 0.97, "box": [x0, y0, x1, y1], "mask": "<PNG, base64>"}, ...]}
      or {"error": "why this picture cannot be judged"}

Boxes are in pixels, y down; ``mask``, as large as the picture and not black where the object is, may be left out.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from glm_training.evaluation.suites.detectors import Detected
from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.rewards.client import Client, Service, Words, encode_png
from glm_training.rewards.exchange import Unanswered
from glm_training.rewards.types import RewardError

AT_ONCE = 8
"""Requests under way."""


def client(
    option: str, url: str, *, token: str | None, retries: int, backoff_seconds: float, health: str | None = "health"
) -> Client:
    """A client of the service that `option` names; token: the environment variable that holds its token.

    Raises EvaluationError for an address that is none.
    """
    if re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url) is None:  # never quoted: it may hold a secret
        raise EvaluationError(f"{option}: an address is http(s)://host[:port][/path], nothing more")
    words = Words(
        name=option,
        address=f"correct {option}",
        patience="the records that are there stay, and running the same command again goes on with the rest",
        token="--token-variable",
        expected="docs/evaluation.md describes what is sent and what is expected",
    )
    service = Service(
        url, AT_ONCE, retries=retries, backoff_seconds=backoff_seconds, token_variable=token, health=health
    )
    return Client(service, words)


class _Detection(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    name: str = Field(alias="class")
    score: Annotated[float, Field(ge=0, le=1)]
    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    mask: str | None = None


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)

    detections: Annotated[list[_Detection], Field(fail_fast=True)] | None = None
    error: str | None = None


class HttpDetector:
    """A detector behind an address."""

    def __init__(self, url: str, *, token: str | None = None, retries: int = 5, backoff_seconds: float = 2.0) -> None:
        self.name = url
        self._client = client("--detector", url, token=token, retries=retries, backoff_seconds=backoff_seconds)

    def check(self, classes: Sequence[str]) -> None:
        """Which classes it knows is the service's to say, picture by picture."""
        try:
            self._client.check()
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def detect(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Detected] | Failure]:
        def body(image: Image.Image) -> bytes:
            return json.dumps({"image": encode_png(image), "classes": list(classes)}).encode()

        try:
            return self._client.ask(
                "detect",
                [lambda image=image: body(image) for image in images],  # type: ignore[misc]
                lambda place, answer: self._read(answer, images[place], classes),
            )
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def _read(self, body: bytes, image: Image.Image, classes: Sequence[str]) -> list[Detected] | Failure:
        answer = self._client.validated(_Answer, body)
        if answer.detections is None:
            said = self._client.shown(answer.error) if answer.error else "neither `detections` nor an `error`"
            return Failure(f"{self.name}: {said}")
        found = []
        for place, one in enumerate(answer.detections):
            x0, y0, x1, y1 = one.box
            if x1 < x0 or y1 < y0:
                raise Unanswered(f"an answer whose `detections.{place}.box` ends before it begins: {one.box}")
            if one.name in classes:
                mask = None if one.mask is None else _mask(one.mask, image, place)
                found.append(Detected(one.name, one.score, (x0, y0, x1, y1), mask))
        return found


def _mask(text: str, image: Image.Image, place: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as picture:
            mask = np.asarray(picture.convert("L")) > 0
    except (OSError, ValueError, SyntaxError, binascii.Error) as error:
        raise Unanswered(f"an answer whose `detections.{place}.mask` is no PNG in base64 ({error})") from None
    if mask.shape != (image.height, image.width):
        raise Unanswered(
            f"an answer whose `detections.{place}.mask` has {mask.shape[1]} x {mask.shape[0]} px for a picture of "
            f"{image.width} x {image.height}"
        )
    return mask
