"""What reads the text in pictures, behind one interface: OCR on this machine, a vision-language model behind an
OpenAI-compatible endpoint (`suites.chat`), or a service:

    GET  {url}/health -> any 2xx
    POST {url}/read {"image": "<PNG, base64>"}
      -> {"lines": ["FRESH", "BREWS"]}       in reading order, none where there is no text
      or {"error": "why this picture cannot be read"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from glm_training.evaluation.suites.chat import PREFIX, ChatModel
from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.evaluation.suites.services import client
from glm_training.evaluation.text.longtext import Language
from glm_training.rewards.client import encode_png
from glm_training.rewards.ocr import load_reader
from glm_training.rewards.options import TextAccuracyOptions
from glm_training.rewards.types import RewardBackendError, RewardError, RewardSampleError

ENGINES = ("rapidocr", "pytesseract")

QUESTION = (
    "Write down all of the text that can be seen in this picture, exactly as it stands there and each piece once, and "
    "nothing else. If there is no text, write: No text recognized"
)
"""What a vision-language model is asked."""

LONGEST_READING = 1024
"""Tokens of its answer, as LongText-Bench's own evaluation has it."""

_NOTHING = re.compile(r"\s*no text recognized\.?\s*", re.IGNORECASE)

_IN_WORDS_OF_EVALUATE = (
    ("text_accuracy: ", "--reader: "),
    ("set reward.options.text_accuracy.engine: ", "give --reader "),
)
_TESSERACT_LANGUAGES: dict[Language, tuple[str, ...]] = {"en": ("eng",), "zh": ("chi_sim", "eng")}


class Reader(Protocol):
    """Reads pictures. `name` stands beside every figure."""

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Raises EvaluationError where it cannot be used."""

    def read(self, images: Sequence[Image.Image]) -> list[list[str] | Failure]:
        """The lines of text in each picture, in reading order; none where there is no text."""


class OcrReader:
    """An OCR engine on this machine, as the metric text_accuracy has it."""

    def __init__(self, engine: str, language: Language) -> None:
        languages = _TESSERACT_LANGUAGES[language] if engine == "pytesseract" else ()
        self.name = engine
        self._options = TextAccuracyOptions(engine=engine, languages=languages)

    def check(self) -> None:
        try:
            load_reader(self._options)
        except RewardBackendError as error:
            message = str(error)
            for theirs, ours in _IN_WORDS_OF_EVALUATE:
                message = message.replace(theirs, ours)
            raise EvaluationError(message) from error

    def read(self, images: Sequence[Image.Image]) -> list[list[str] | Failure]:
        self.check()
        engine = load_reader(self._options)

        def attempt(image: Image.Image) -> list[str] | Failure:
            try:
                return engine.read(np.asarray(image.convert("RGB")))
            except RewardSampleError as error:
                return Failure(str(error))

        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            return list(pool.map(attempt, images))


class ChatReader:
    """A vision-language model that is asked for the text."""

    def __init__(self, spec: str, *, token: str | None = None, retries: int = 5, backoff_seconds: float = 2.0) -> None:
        self._model = ChatModel(
            "--reader", spec, longest=LONGEST_READING, token=token, retries=retries, backoff_seconds=backoff_seconds
        )
        self.name = self._model.name

    def check(self) -> None:
        self._model.check()

    def read(self, images: Sequence[Image.Image]) -> list[list[str] | Failure]:
        answers = self._model.ask([(image, QUESTION) for image in images])
        return [answer if isinstance(answer, Failure) else _lines(answer) for answer in answers]


def _lines(answer: str) -> list[str]:
    """Without the sentence that stands for nothing, which would count as words."""
    return [] if _NOTHING.fullmatch(answer) else [line for line in answer.splitlines() if line.strip()]


class _Reading(BaseModel):
    model_config = ConfigDict(strict=True)

    lines: Annotated[list[str], Field(fail_fast=True)] | None = None
    error: str | None = None


class HttpReader:
    """A service that reads."""

    def __init__(self, url: str, *, token: str | None = None, retries: int = 5, backoff_seconds: float = 2.0) -> None:
        self._client = client("--reader", url, token=token, retries=retries, backoff_seconds=backoff_seconds)
        self.name = url

    def check(self) -> None:
        try:
            self._client.check()
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def read(self, images: Sequence[Image.Image]) -> list[list[str] | Failure]:
        try:
            return self._client.ask(
                "read",
                [lambda image=image: json.dumps({"image": encode_png(image)}).encode() for image in images],  # type: ignore[misc]
                lambda place, answer: self._read(answer),
            )
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def _read(self, body: bytes) -> list[str] | Failure:
        answer = self._client.validated(_Reading, body)
        if answer.lines is None:
            said = self._client.shown(answer.error) if answer.error else "neither `lines` nor an `error`"
            return Failure(f"{self.name}: {said}")
        return answer.lines


def reader(spec: str, language: Language, token: str | None) -> Reader:
    """The reader that `--reader` names; token: the environment variable with that of a service. Raises EvaluationError
    for one that there is not."""
    if spec in ENGINES:
        return OcrReader(spec, language)
    if spec.startswith(PREFIX):
        return ChatReader(spec, token=token)
    if spec.startswith(("http://", "https://")):
        return HttpReader(spec, token=token)
    raise EvaluationError(f"--reader {spec}: write {', '.join(ENGINES)}, {PREFIX}MODEL@ADDRESS or http://host:port")
