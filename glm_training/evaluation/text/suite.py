"""CVTG-2K and LongText-Bench as a suite: their layouts, records and figures.

OUT/CVTG/2/0.png ...    CVTG-2K: set, number of areas, index of the prompt
OUT/0.png ...           LongText-Bench: id of the prompt
OUT/0_1.png             a further sample of the same prompt, of either
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from glm_training.evaluation.suites.protocol import EvaluationError, Failure, Figure, Picture, Record, Scores, mean_of
from glm_training.evaluation.text.cvtg import CLIP_PREFIX, clip_score, read_words, similarities, words_found
from glm_training.evaluation.text.longtext import Language, matched
from glm_training.evaluation.text.prompts import TextPrompts
from glm_training.evaluation.text.readers import Reader
from glm_training.rewards.clip import ClipPair
from glm_training.rewards.types import RewardBackendError, from_pil
from glm_training.utils.console import Console
from glm_training.utils.hub_files import fetch_where_allowed

PUBLISHED = {"cvtg": "PP-OCRv4", "longtext": "Qwen2.5-VL-7B-Instruct"}
"""What reads in the figures that are published."""


class ClipScorer:
    """CLIPScore of CVTG-2K. model: hub id or folder of a CLIP with its tokenizer."""

    def __init__(self, model: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = model
        self._pair = ClipPair("--clip", (model, "_clip_"), (model, "_clip_"), device)

    def check(self) -> None:
        """Fetches it where it is not here. Raises EvaluationError naming what is missing."""
        problems = fetch_where_allowed(self._pair.wanted(), Console().line)
        try:
            self._pair.load()
        except RewardBackendError as error:
            message = "\n".join([*problems, str(error)]).replace("set reward.options._clip_ to", "give --clip")
            raise EvaluationError(message) from error

    def score(self, image: Image.Image, prompt: str) -> float:
        """2.5 max(cos, 0) of one picture: alone, so that it does not depend on its neighbours."""
        return clip_score(self._pair.cosines(from_pil(image), [CLIP_PREFIX + prompt]).item())


class TextSuite:
    """samples: pictures of each prompt that are drawn. clip: for CVTG-2K's CLIPScore, None leaves it out."""

    name = "text"

    def __init__(self, prompts: TextPrompts, samples: int, reader: Reader, clip: ClipScorer | None) -> None:
        self._prompts, self._samples = prompts, samples
        self._reader = reader
        self._clip = clip if prompts.benchmark == "cvtg" else None

    @property
    def judged_by(self) -> str:
        return self._reader.name if self._clip is None else f"{self._reader.name}, CLIPScore {self._clip.name}"

    @property
    def judge_settings(self) -> Mapping[str, Any]:
        asked = [(prompt.name, prompt.prompt, prompt.wanted) for prompt in self._prompts.prompts]
        digest = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:16]
        return {"benchmark": self._prompts.benchmark, "language": self._prompts.language, "prompts": digest}

    def pictures(self) -> list[Picture]:
        """Prompt by prompt, `samples` of each."""
        return [
            Picture(f"{prompt.name}_{sample}.png" if sample else f"{prompt.name}.png", prompt.prompt, index, (sample,))
            for index, prompt in enumerate(self._prompts.prompts)
            for sample in range(self._samples)
        ]

    def prepare(self, folder: Path) -> None:
        """Nothing lies beside the pictures."""

    def find(self, folder: Path) -> list[Picture]:
        """The pictures that a folder has of each prompt; of one without any the first, which is then missing.

        Raises EvaluationError where there is none at all.
        """
        there = _samples_in(folder)
        pictures = []
        for index, prompt in enumerate(self._prompts.prompts):
            for sample, path in sorted(there.get(prompt.name, {}).items()) or [(0, f"{prompt.name}.png")]:
                pictures.append(Picture(path, prompt.prompt, index, (sample,)))
        if not any((folder / picture.path).is_file() for picture in pictures):
            example = self._prompts.prompts[0].name
            raise EvaluationError(f"--images {folder} holds no picture of these prompts, as {example}.png would be")
        return pictures

    def check_judge(self) -> None:
        self._reader.check()
        if self._clip is not None:
            self._clip.check()

    def judge(self, pictures: list[tuple[Picture, Image.Image]]) -> list[Record | Failure]:
        found = self._reader.read([image for _, image in pictures])
        return [
            lines if isinstance(lines, Failure) else self._record(picture, image, lines)
            for (picture, image), lines in zip(pictures, found, strict=True)
        ]

    def _record(self, picture: Picture, image: Image.Image, lines: Sequence[str]) -> Record:
        prompt = self._prompts.prompts[picture.index]
        record = {
            "index": picture.index,
            "sample": picture.samples[0],
            "prompt": prompt.prompt,
            "group": prompt.group,
            "wanted": list(prompt.wanted),
            "read": list(lines),
        }
        return record if self._clip is None else record | {"clip": self._clip.score(image, prompt.prompt)}

    def score(self, records: list[Record]) -> Scores:
        scores = score_cvtg(records) if self._prompts.benchmark == "cvtg" else score_longtext(records, self._language)
        scores.remarks.append(f"Figures that are published were read by {PUBLISHED[self._prompts.benchmark]}.")
        if self._prompts.benchmark == "cvtg" and self._clip is None:
            scores.remarks.append("CLIPScore is left out: --clip openai/clip-vit-large-patch14 is the published one.")
        return scores

    @property
    def _language(self) -> Language:
        return self._prompts.language


def _samples_in(folder: Path) -> dict[str, dict[int, str]]:
    """Name of a prompt -> sample -> the picture's path below `folder`."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for path in sorted(folder.rglob("*.png")):
        below = path.relative_to(folder).with_suffix("").as_posix()
        found[below].setdefault(0, f"{below}.png")
        numbered = re.fullmatch(r"(.+)_(\d+)", below)
        if numbered is not None:
            found[numbered[1]][int(numbered[2])] = f"{below}.png"
    return found


def score_cvtg(records: Sequence[Record]) -> Scores:
    """CVTG-2K's figures: words that were read exactly, and the similarity to the nearest reading, over all words;
    CLIPScore over pictures. By number of areas: the words read exactly."""
    exact, near, clip = _Groups(), _Groups(), _Groups()
    areas: dict[str, _Groups] = defaultdict(_Groups)
    lines = []
    for record in records:
        wanted, read = record["wanted"], read_words(record["read"])
        found, values = words_found(wanted, read), similarities(wanted, read)
        exact.add(record["index"], found)
        areas[record["group"]].add(record["index"], found)
        near.add(record["index"], values)
        if "clip" in record:
            clip.add(record["index"], [record["clip"]])
        lines.append({"picture": record["picture"], "words": len(wanted), "exact": sum(found), "near": values})
    figures = [exact.mean("word accuracy", "words"), near.mean("NED (1 = best)", "words")]
    if clip.values:
        figures.append(clip.mean("CLIPScore", "pictures"))
    if len(areas) > 1:
        figures += [groups.mean(f"word accuracy, {area}", "words") for area, groups in sorted(areas.items())]
    return Scores(figures, lines)


def score_longtext(records: Sequence[Record], language: Language) -> Scores:
    """LongText-Bench's figure: the share of words (English) or characters (Chinese) that were read, over all pictures
    and by category."""
    every, categories = _Groups(), defaultdict[str, _Groups](_Groups)
    lines = []
    for record in records:
        right, asked = matched(record["wanted"], record["read"], language)
        found = [True] * right + [False] * (asked - right)
        every.add(record["index"], found)
        categories[record["group"]].add(record["index"], found)
        lines.append({"picture": record["picture"], "matched": right, "asked": asked})
    of = "words" if language == "en" else "characters"
    figures = [every.mean(f"text score ({language})", of)]
    if len(categories) > 1:
        figures += [groups.mean(f"text score, {name}", of) for name, groups in sorted(categories.items())]
    return Scores(figures, lines)


class _Groups:
    """Values by prompt, whose pictures and words are alike."""

    def __init__(self) -> None:
        self.values: dict[int, list[float]] = defaultdict(list)

    def add(self, prompt: int, values: Sequence[float]) -> None:
        self.values[prompt] += map(float, values)

    def mean(self, name: str, of: str) -> Figure:
        return mean_of(name, self.values, of=of)
