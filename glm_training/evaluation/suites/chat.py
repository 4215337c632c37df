"""A vision-language model behind an OpenAI-compatible endpoint, as vLLM, SGLang and others serve it.

GET  {url}/models            -> any 2xx
POST {url}/chat/completions
     {"model": "...", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url":
      "data:image/png;base64,..."}}, {"type": "text", "text": "the question"}]}], "temperature": 0, ...}
  -> {"choices": [{"message": {"content": "the answer"}}]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.evaluation.suites.services import client
from glm_training.rewards.client import encode_png
from glm_training.rewards.types import RewardError

PREFIX = "openai:"


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)

    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True)

    message: _Message


class _Completion(BaseModel):
    model_config = ConfigDict(strict=True)

    choices: Annotated[list[_Choice], Field(min_length=1)]


class ChatModel:
    """spec: `openai:MODEL@ADDRESS`, with the address below which /chat/completions lies (it ends in /v1 as a rule).

    option: the command's option that gives it, for messages. longest: tokens of an answer. Raises EvaluationError for
    another spec.
    """

    def __init__(
        self,
        option: str,
        spec: str,
        *,
        longest: int,
        token: str | None = None,
        retries: int = 5,
        backoff_seconds: float = 2.0,
    ) -> None:
        model, at, url = spec.removeprefix(PREFIX).rpartition("@")
        if not spec.startswith(PREFIX) or not at or not model:
            raise EvaluationError(f"{option}: write {PREFIX}MODEL@ADDRESS, as {PREFIX}qwen@http://localhost:8000/v1")
        self.name = f"{model} at {url}"
        self._option, self._model, self._longest = option, model, longest
        self._client = client(
            option, url, token=token, retries=retries, backoff_seconds=backoff_seconds, health="models"
        )

    def check(self) -> None:
        """Raises EvaluationError where nobody answers."""
        try:
            self._client.check()
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def ask(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str | Failure]:
        """The answer to each question about its picture, the likeliest one."""
        try:
            return self._client.ask(
                "chat/completions",
                [lambda asked=asked: self._body(*asked) for asked in questions],  # type: ignore[misc]
                lambda place, answer: self._read(answer),
            )
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def _body(self, image: Image.Image, question: str) -> bytes:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(image)}"}}
        content = [picture, {"type": "text", "text": question}]
        request = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self._longest,
        }
        return json.dumps(request).encode()

    def _read(self, body: bytes) -> str | Failure:
        message = self._client.validated(_Completion, body).choices[0].message
        if message.content is None:
            said = self._client.shown(message.refusal) if message.refusal else "an answer without content"
            return Failure(f"{self._option}: {said}")
        return message.content
