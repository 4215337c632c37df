"""GenEval as a suite: its layout, its records, its figures.

OUT/00000/metadata.jsonl          line 1 of the prompts
OUT/00000/samples/0000.png ...    its pictures
OUT/results.jsonl                 what the public `summary_scores.py` reads
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from glm_training.data.problems import Problem, format_problems
from glm_training.evaluation.suites.detectors import RECORDED_FROM, ColorJudge, Detected, Detector, recorded
from glm_training.evaluation.suites.files import digest, write_whole
from glm_training.evaluation.suites.geneval.prompts import SOURCE, Metadata, classes_of, parsed, read_prompts
from glm_training.evaluation.suites.geneval.rules import TAGS, colored_objects, verdict
from glm_training.evaluation.suites.protocol import (
    EvaluationError,
    Failure,
    Figure,
    Picture,
    Record,
    Scores,
    mean_of,
)

METADATA, SAMPLES = "metadata.jsonl", "samples"
_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class GenEval:
    """prompts: the records of a prompts file, None where a folder of pictures brings its own. samples: pictures of each
    prompt that are drawn."""

    name = "geneval"

    def __init__(
        self, prompts: Sequence[Metadata] | None, samples: int, detector: Detector, colors: ColorJudge
    ) -> None:
        self._prompts = None if prompts is None else list(prompts)
        self._samples = samples
        self._detector, self._colors = detector, colors
        self._of_index: dict[int, Metadata] = dict(enumerate(self._prompts or []))

    @property
    def judged_by(self) -> str:
        return f"{self._detector.name}, colours {self._colors.name}"

    @property
    def judge_settings(self) -> Mapping[str, Any]:
        asked = {str(index): self._of_index[index] for index in sorted(self._of_index)}
        return {"recorded_from": RECORDED_FROM, "asked": digest(asked)}

    def pictures(self) -> list[Picture]:
        """Prompt by prompt, `samples` of each."""
        if self._prompts is None:
            raise EvaluationError(f"--prompts names no file. {SOURCE}")
        return [
            Picture(f"{index:05d}/{SAMPLES}/{sample:04d}.png", metadata["prompt"], index, (sample,))
            for index, metadata in enumerate(self._prompts)
            for sample in range(self._samples)
        ]

    def prepare(self, folder: Path) -> None:
        """Writes each prompt's record beside its pictures. Raises EvaluationError, and writes nothing, where another
        one is there: the same prompts may have been asked for other things."""
        texts = {folder / f"{i:05d}" / METADATA: json.dumps(metadata) for i, metadata in self._of_index.items()}
        there = {path: path.read_text(encoding="utf-8", errors="replace") for path in texts if path.is_file()}
        for path, text in there.items():
            if text != texts[path]:
                asked = f"{path} asks for other things than the line of --prompts that it was written for"
                raise EvaluationError(f"{asked}: give another --out, or the --prompts of then")
        for path, text in texts.items():
            if path not in there:
                write_whole(path, text)

    def find(self, folder: Path) -> list[Picture]:
        """The pictures of the numbered folders, and of prompts without any the first, which is then missing.

        Raises EvaluationError, naming every file, for metadata that are none or not those of the prompts file.
        """
        problems: list[Problem] = []
        numbered = _numbered(folder, problems)
        if not numbered:
            raise EvaluationError(f"--images {folder} holds no folders 00000, 00001, ... in GenEval's layout")
        pictures = []
        for index, place in sorted(numbered.items()):
            metadata = self._metadata(place, index, problems)
            samples = _samples(place / SAMPLES, problems)
            if metadata is None:
                continue
            self._of_index[index] = metadata
            names = [path.relative_to(folder).as_posix() for path in samples]
            names = names or [f"{place.name}/{SAMPLES}/0000.png"]
            pictures += [Picture(name, metadata["prompt"], index, (int(Path(name).stem),)) for name in names]
        if problems:
            raise EvaluationError(format_problems(problems, heading=f"--images {folder} cannot be used:"))
        lacking = [index for index in range(len(self._prompts or [])) if index not in numbered]
        pictures += [Picture(f"{i:05d}/{SAMPLES}/0000.png", self._of_index[i]["prompt"], i) for i in lacking]
        return sorted(pictures, key=lambda picture: (picture.index, picture.path))

    def _metadata(self, place: Path, index: int, problems: list[Problem]) -> Metadata | None:
        path = place / METADATA
        try:
            record, fault = parsed(path.read_text(encoding="utf-8-sig").strip(), index)
        except (OSError, UnicodeDecodeError) as error:
            record, fault = None, (f"cannot be read ({error})", "Put the prompt's line of the prompts file there")
        if fault is None and self._prompts is not None:
            if index >= len(self._prompts):
                fault = f"is of line {index + 1}, and --prompts has {len(self._prompts)}", "Give the right --prompts"
            elif record != self._prompts[index]:
                fault = f"is not line {index + 1} of --prompts", "Give the --prompts that were drawn, or none"
        if fault is not None:
            problems.append(Problem(path, *fault, line=1))
        return record if fault is None else None

    def check_judge(self) -> None:
        self._detector.check(classes_of(list(self._of_index.values())))
        self._colors.check()

    def judge(self, pictures: list[tuple[Picture, Image.Image]]) -> list[Record | Failure]:
        wanted = [self._of_index[picture.index] for picture, _ in pictures]
        # of all prompts: what is recorded of a picture must not depend on those that are judged with it
        found = self._detector.detect([image for _, image in pictures], classes_of(list(self._of_index.values())))
        return [
            objects if isinstance(objects, Failure) else self._record(picture, image, metadata, objects)
            for (picture, image), metadata, objects in zip(pictures, wanted, found, strict=True)
        ]

    def _record(self, picture: Picture, image: Image.Image, metadata: Metadata, objects: Sequence[Detected]) -> Record:
        objects = [detected for detected in objects if detected.score >= RECORDED_FROM]
        plain = [recorded(detected, None) for detected in objects]
        asked = [next(i for i, other in enumerate(plain) if other is d) for d, _ in colored_objects(plain, metadata)]
        told = self._colors.colors(image, [(objects[i], objects[i].name) for i in asked]) if asked else []
        colors = dict(zip(asked, told, strict=True))
        return {
            "index": picture.index,
            "sample": picture.samples[0],
            "metadata": metadata,
            "size": list(image.size),
            "detections": [recorded(detected, colors.get(i)) for i, detected in enumerate(objects)],
        }

    def score(self, records: list[Record]) -> Scores:
        return score(records)


def score(records: Sequence[Record]) -> Scores:
    """Figures of recorded pictures: the mean of each tag over its pictures, and over the six tags their mean.

    Standard errors are over prompts, whose pictures are alike; the overall one takes the tags as independent.
    """
    lines = []
    by_tag: dict[str, dict[int, list[float]]] = {tag: {} for tag in TAGS}
    by_prompt: dict[int, list[float]] = {}
    for record in records:
        metadata = record["metadata"]
        right, reasons = verdict(record["detections"], metadata)
        by_tag[metadata["tag"]].setdefault(record["index"], []).append(float(right))
        by_prompt.setdefault(record["index"], []).append(float(right))
        lines.append(_line(record, right, reasons))
    tags = [mean_of(tag, groups, scale=100) for tag, groups in by_tag.items() if groups]
    scores = Scores([*tags, _overall(tags)], lines)
    scores.figures.append(mean_of("right pictures", by_prompt, scale=100))
    counts = sorted({len(values) for values in by_prompt.values()})
    if len(counts) > 1:
        scores.remarks.append(f"Of a prompt {counts[0]} to {counts[-1]} pictures were judged.")
    any_right = {index: [max(values)] for index, values in by_prompt.items()}
    scores.figures.append(mean_of("prompts with a right picture", any_right, of="prompts", scale=100))
    if len(tags) < len(TAGS):
        lacking = [tag for tag, groups in by_tag.items() if not groups]
        scores.remarks.append(f"No pictures of {', '.join(lacking)}: the overall figure is not GenEval's.")
    return scores


def _overall(tags: Sequence[Figure]) -> Figure:
    values = [figure.value for figure in tags if figure.value is not None]
    errors = [figure.error for figure in tags]
    known = [error for error in errors if error is not None]
    error = math.sqrt(math.fsum(e**2 for e in known)) / len(tags) if len(known) == len(tags) else None
    name = "overall" if len(tags) == len(TAGS) else f"mean of {len(tags)} tags"
    return Figure(name, math.fsum(values) / len(values), error, len(tags), "tags", 100)


def _line(record: Record, right: bool, reasons: Sequence[str]) -> Record:
    """A line of the public evaluator's results; "details" has the boxes with their scores by class."""
    details: dict[str, list[list[float]]] = {}
    for detection in record["detections"]:
        details.setdefault(detection["class"], []).append([*detection["box"], detection["score"]])
    metadata = record["metadata"]
    return {
        "filename": record["picture"],
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": right,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }


def _numbered(folder: Path, problems: list[Problem]) -> dict[int, Path]:
    """The folders of the prompts by their numbers."""
    numbered: dict[int, Path] = {}
    for path in _below(folder):
        if path.is_dir() and re.fullmatch(r"[0-9]{1,9}", path.name):
            there = numbered.setdefault(int(path.name), path)
            if there is not path:
                problems.append(Problem(path, f"is number {int(path.name)}, as {there.name} is", "Remove one of them"))
    return numbered


def _samples(folder: Path, problems: list[Problem]) -> list[Path]:
    """The pictures of a prompt: a number and .png."""
    found = [path for path in _below(folder) if re.fullmatch(r"[0-9]+\.\w+", path.name)]
    others = [path for path in found if path.suffix.lower() in _OTHER_PICTURES]
    problems += [Problem(path, "is no .png, and would not be judged", "Save it as a PNG") for path in others]
    return [path for path in found if path.suffix == ".png"]


def _below(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


__all__ = ["GenEval", "read_prompts", "score"]
