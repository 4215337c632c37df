"""DPG-Bench as a suite: its layout, its records.

OUT/{name}.png     four samples of the prompt in {name}.txt, in a grid of 2 x 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from glm_training.evaluation.suites.answering import Answerer
from glm_training.evaluation.suites.dpg.questions import SOURCE, Question, key_of
from glm_training.evaluation.suites.dpg.rules import score
from glm_training.evaluation.suites.drawing import tiles
from glm_training.evaluation.suites.files import digest
from glm_training.evaluation.suites.protocol import EvaluationError, Failure, Picture, Record, Scores
from glm_training.utils.words import counted


class DPG:
    """prompts: name -> prompt, None where there are only pictures to judge. questions: item -> its questions.
    samples: 4, or 1 for pictures that are no grids."""

    name = "dpg"

    def __init__(
        self,
        prompts: Mapping[str, str] | None,
        questions: Mapping[str, list[Question]],
        samples: int,
        answerer: Answerer,
    ) -> None:
        if samples not in (1, 4):
            raise EvaluationError(f"--samples {samples}: DPG-Bench's pictures are grids of 4; 1 is allowed too")
        self._prompts, self._questions, self._samples = prompts, questions, samples
        self._answerer = answerer
        if prompts is not None:
            self._check_items(prompts)

    def _check_items(self, prompts: Mapping[str, str]) -> None:
        items = {key_of(name) for name in prompts}
        faults = []
        for missing, what in (
            (sorted(items - set(self._questions)), "{} without questions in --questions"),
            (sorted(set(self._questions) - items), "{} of --questions without a file in --prompts"),
        ):
            if missing:
                some = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
                faults.append(f"{what.format(counted(len(missing), 'item'))}: {some}")
        if faults:
            raise EvaluationError(f"--prompts and --questions do not fit together: {'; '.join(faults)}")

    @property
    def judged_by(self) -> str:
        return self._answerer.name

    @property
    def judge_settings(self) -> Mapping[str, Any]:
        asked = {item: [question.recorded() for question in questions] for item, questions in self._questions.items()}
        return {"tiles": self._samples, "asked": digest(asked), **self._answerer.settings}

    def pictures(self) -> list[Picture]:
        """One for each prompt."""
        if self._prompts is None:
            raise EvaluationError(f"--prompts names no folder. {SOURCE}")
        samples = tuple(range(self._samples))
        return [
            Picture(f"{name}.png", text, index, samples) for index, (name, text) in enumerate(self._prompts.items())
        ]

    def prepare(self, folder: Path) -> None:
        """Nothing lies beside the pictures."""

    def find(self, folder: Path) -> list[Picture]:
        """The .png of the folder, and of items without any the one that is missing."""
        names = sorted(path.name for path in folder.glob("*.png") if not path.name.startswith("."))
        if not any(key_of(name) in self._questions for name in names):
            raise EvaluationError(f"--images {folder} holds no .png that is named as an item of --questions")
        there = {key_of(name) for name in names}
        names += [f"{item}.png" for item in self._questions if item not in there]
        return [Picture(name, "", index) for index, name in enumerate(names)]

    def check_judge(self) -> None:
        self._answerer.check()

    def judge(self, pictures: list[tuple[Picture, Image.Image]]) -> list[Record | Failure]:
        return [self._judged(picture, image) for picture, image in pictures]

    def _judged(self, picture: Picture, image: Image.Image) -> Record | Failure:
        item = key_of(picture.path)
        questions = self._questions.get(item)
        if questions is None:
            return Failure(f"--questions has no item {item}")
        try:
            cut = tiles(image, round(self._samples**0.5))
        except ValueError as error:
            return Failure(str(error))
        asked = [question.question for question in questions]
        answers = self._answerer.answer([(tile, asked) for tile in cut])
        for place, said in enumerate(answers):
            for question, answer in zip(questions, said, strict=True):
                if isinstance(answer, Failure) or not answer.strip():
                    reason = answer.reason if isinstance(answer, Failure) else f"{self.judged_by} answers nothing"
                    return Failure(f"tile {place}, question {question.id}: {reason}")
        return {
            "item": item,
            "questions": [question.recorded() for question in questions],
            "tiles": [
                {str(question.id): answer for question, answer in zip(questions, said, strict=True)} for said in answers
            ],
        }

    def score(self, records: list[Record]) -> Scores:
        return score(records)
