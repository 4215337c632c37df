"""What answers questions about pictures, behind one interface."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Protocol

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from glm_training.evaluation.suites.chat import PREFIX, ChatModel
from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.evaluation.suites.services import client
from glm_training.rewards.client import encode_png
from glm_training.rewards.exchange import Unanswered
from glm_training.rewards.foreign import shown
from glm_training.rewards.shapes import COLORS, SHAPES, find_blobs
from glm_training.rewards.types import RewardError
from glm_training.utils.words import counted

Answer = str | Failure

YES_OR_NO = "Answer with yes or no and nothing else."

_LONGEST_ANSWER = 8
"""Tokens."""
_ENDING = "ForQuestionAnswering"


class Answerer(Protocol):
    """Answers questions. `name` stands beside every figure; `settings`: what else decides the answers."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def check(self) -> None:
        """Raises EvaluationError where it cannot be used; loads little."""

    def answer(self, asked: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[Answer]]:
        """The answers to the questions of each picture."""


class ShapesAnswerer:
    """The classical checker of the tiny world, for the questions that data/benchmarks/dpg_tiny asks."""

    name = "shapes"
    settings: Mapping[str, Any] = {}

    def check(self) -> None:
        """Nothing is needed."""

    def answer(self, asked: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[Answer]]:
        answers = []
        for image, questions in asked:
            blobs = sorted(find_blobs(image), key=lambda blob: -int(blob.mask.sum()))
            answers.append([_of_shapes(blobs, question) for question in questions])
        return answers


def _of_shapes(blobs: Sequence[Any], question: str) -> Answer:
    """Of shapes, largest first."""
    shape, color = "|".join(SHAPES), "|".join(COLORS)
    found = {name: [blob for blob in blobs if blob.shape == name] for name in SHAPES}
    counts = {"two": 2, "three": 3, "four": 4}
    if match := re.fullmatch(rf"Is there an? ({shape})\?", question):
        holds = bool(found[match[1]])
    elif match := re.fullmatch(rf"Are there exactly ({'|'.join(counts)}) ({shape})s\?", question):
        holds = len(found[match[2]]) == counts[match[1]]
    elif match := re.fullmatch(rf"(?:Is|Are) the ({shape})s? ({color})\?", question):
        holds = bool(found[match[1]]) and all(blob.color == match[2] for blob in found[match[1]])
    elif match := re.fullmatch(rf"Is the ({shape}) (left of|right of|above|below) the ({shape})\?", question):
        first, second = found[match[1]][:1], found[match[3]][:1]
        holds = bool(first and second) and _stands(first[0], match[2], second[0])
    else:
        return Failure(f"{question!r} is no question of the tiny world")
    return "yes" if holds else "no"


def _stands(first: Any, relation: str, second: Any) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    sides = {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}
    return bool(sides[relation])


class TransformersAnswerer:
    """A model for visual question answering in transformers: a classifier of answers (ViLT), or a writer (BLIP)."""

    settings: Mapping[str, Any] = {}

    def __init__(self, model: str, device: Any = None) -> None:
        """model: a folder, or a hub id that is in the local cache."""
        self.name = f"transformers:{model}"
        self._model_name, self._device = model, device

    def check(self) -> None:
        """Loads its processor."""
        _ = self._class, self._processor

    @cached_property
    def _class(self) -> str:
        from transformers import AutoConfig

        config = self._loaded(lambda: AutoConfig.from_pretrained(self._model_name, local_files_only=True))
        name = (getattr(config, "architectures", None) or ["no class"])[0]
        if not name.endswith(_ENDING):
            raise EvaluationError(
                f"--judge {self.name} is a {name}: a class is needed whose name ends with {_ENDING}. A chat model is "
                "served by a program of its own (vLLM, for one) and named as openai:MODEL@ADDRESS"
            )
        return str(name)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return self._loaded(lambda: AutoProcessor.from_pretrained(self._model_name, local_files_only=True))

    @cached_property
    def _model(self) -> Any:
        import torch
        import transformers

        kind = getattr(transformers, self._class)
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = self._loaded(lambda: kind.from_pretrained(self._model_name, dtype=torch.float32, local_files_only=True))
        return model.requires_grad_(False).eval().to(device)

    def _loaded(self, load: Any) -> Any:
        try:
            return load()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(
                f"--judge {self.name} is neither a folder of a model nor in the local Hugging Face cache ({first}). "
                f"Run `hf download {self._model_name}`, or name a folder that holds it"
            ) from error

    def answer(self, asked: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[Answer]]:
        """One question at a time: a batch is padded, which may change an answer."""
        return [[self._said(image, question) for question in questions] for image, questions in asked]

    def _said(self, image: Image.Image, question: str) -> str:
        import torch

        inputs = self._processor(images=image, text=question, return_tensors="pt").to(self._model.device)
        with torch.no_grad():
            if hasattr(self._model, "generate"):
                written = self._model.generate(**inputs, max_new_tokens=8, do_sample=False)
                return str(self._processor.batch_decode(written, skip_special_tokens=True)[0]).strip()
            logits = self._model(**inputs).logits
        return str(self._model.config.id2label[int(logits.argmax(dim=-1))])


class _Answers(BaseModel):
    model_config = ConfigDict(strict=True)

    answers: Annotated[list[str], Field(fail_fast=True)] | None = None
    error: str | None = None


class HttpAnswerer:
    """A service.

    GET  {url}/health -> any 2xx
    POST {url}/answer {"image": "<PNG, base64>", "questions": [...]} -> {"answers": [...]} or {"error": "..."}
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, url: str, *, token: str | None = None, retries: int = 5, backoff_seconds: float = 2.0) -> None:
        self.name = url
        self._client = client("--judge", url, token=token, retries=retries, backoff_seconds=backoff_seconds)

    def check(self) -> None:
        """Asks whether it is there."""
        try:
            self._client.check()
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def answer(self, asked: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[Answer]]:
        def body(image: Image.Image, questions: Sequence[str]) -> bytes:
            return json.dumps({"image": encode_png(image), "questions": list(questions)}).encode()

        try:
            return self._client.ask(
                "answer",
                [lambda one=one: body(*one) for one in asked],  # type: ignore[misc]
                lambda place, answer: self._read(answer, len(asked[place][1])),
            )
        except RewardError as error:
            raise EvaluationError(str(error)) from error

    def _read(self, body: bytes, count: int) -> list[Answer]:
        answer = self._client.validated(_Answers, body)
        if answer.answers is None:
            said = self._client.shown(answer.error) if answer.error else "neither `answers` nor an `error`"
            return [Failure(f"{self.name}: {said}")] * count
        if len(answer.answers) != count:
            raise Unanswered(f"an answer with {len(answer.answers)} answers for {counted(count, 'question')}")
        return list(answer.answers)


class ChatAnswerer:
    """A chat model behind an endpoint as OpenAI's, asked each question by itself. What it says that is neither yes nor
    no is a failure of its own, and no no."""

    settings: Mapping[str, Any] = {"instruction": YES_OR_NO}

    def __init__(self, spec: str, *, token: str | None = None, retries: int = 5, backoff_seconds: float = 2.0) -> None:
        options: dict[str, Any] = {"token": token, "retries": retries, "backoff_seconds": backoff_seconds}
        self._model = ChatModel("--judge", spec, longest=_LONGEST_ANSWER, **options)
        self.name = self._model.name

    def check(self) -> None:
        """Asks whether it is there."""
        self._model.check()

    def answer(self, asked: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[Answer]]:
        each = [(image, f"{question} {YES_OR_NO}") for image, questions in asked for question in questions]
        said = iter(self._model.ask(each))
        return [[self._read(next(said)) for _ in questions] for _, questions in asked]

    def _read(self, said: str | Failure) -> Answer:
        if isinstance(said, Failure):
            return said
        plain = said.strip().rstrip(".!").lower()
        return plain if plain in ("yes", "no") else Failure(f"{self.name} answers {shown(said, 80)!r}, not yes or no")


def answerer(spec: str, token: str | None) -> Answerer:
    """What `--judge` names. Raises EvaluationError for what names none."""
    kind, _, rest = spec.partition(":")
    if spec == "shapes":
        return ShapesAnswerer()
    if kind == "transformers" and rest:
        return TransformersAnswerer(rest)
    if spec.startswith(PREFIX):
        return ChatAnswerer(spec, token=token)
    if kind in ("http", "https"):
        return HttpAnswerer(spec, token=token)
    raise EvaluationError(
        f"--judge {spec}: write transformers:MODEL, openai:MODEL@http://host:port/v1, http://host:port or shapes"
    )
