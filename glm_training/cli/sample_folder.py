"""The folder that `glm-train sample` draws into: which picture has which name, and what is recorded of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from glm_training.cli.sample_grid import Row, write_grids
from glm_training.data.prompts_to_draw import PromptToDraw
from glm_training.evaluation.suites.drawn_samples import SAMPLES, is_record, read_samples
from glm_training.evaluation.suites.files import digest
from glm_training.evaluation.suites.stages import is_whole, save_whole


@dataclass(frozen=True)
class Wanted:
    """A picture: of which prompt, which of its plans (of a family without plans: samples) and renders, and its file."""

    asked: PromptToDraw
    plan: int
    render: int
    file: str
    group: str


class SampleFolder:
    """Pictures `<number>-<plan>.png`, with several renders `<number>-<plan>-<render>.png`, and `samples.jsonl`.

    A prompt that is drawn again with the same model, seed and settings keeps its number, and what is there of it stays;
    any other takes the next that is free. Nothing is written over.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], plans: int, renders: int) -> None:
        """`settings`: all that decides a picture besides its prompt, source and place. Raises EvaluationError for a
        file of records that is none."""
        self.folder, self.settings = folder, dict(settings)
        self.plans, self.renders = plans, renders
        self._records = {record["file"]: record for record in read_samples(folder)}

    def wanted(self, asked: Sequence[PromptToDraw]) -> list[Wanted]:
        """The pictures of all prompts, prompt by prompt and plan by plan."""
        numbers = {record["group"]: _number(name) for name, record in self._records.items()}
        there = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        free = max((_number(name) for name in (*self._records, *there)), default=-1) + 1
        found = []
        for each in asked:
            group = self._group(each)
            if group not in numbers:
                numbers[group], free = free, free + 1
            for plan in range(self.plans):
                for render in range(self.renders):
                    tail = f"-{render}" if self.renders > 1 else ""
                    found.append(Wanted(each, plan, render, f"{numbers[group]}-{plan}{tail}.png", group))
        return found

    def is_there(self, picture: Wanted) -> bool:
        """Whether it need not be drawn."""
        return picture.file in self._records and is_whole(self.folder / picture.file)

    def keep(self, pictures: Sequence[Wanted], images: Sequence[Image.Image]) -> None:
        """Records the pictures, then writes them: what a kill leaves without a record is none of these, and is not
        written over. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = [self._record(each) for each in pictures if each.file not in self._records]
        if fresh:
            with (self.folder / SAMPLES).open("ab") as file:
                _end_line(self.folder / SAMPLES, file)
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in fresh)
                file.write(lines.encode("utf-8", "backslashreplace"))  # a half surrogate, as JSON escapes it
                file.flush()
                os.fsync(file.fileno())
            self._records |= {record["file"]: record for record in fresh}
        for picture, image in zip(pictures, images, strict=True):
            save_whole(self.folder / picture.file, image)

    def write_grids(self, wanted: Sequence[Wanted]) -> list[Path]:
        """Overviews of the pictures, some prompts on each; their paths. Raises OSError."""
        rows: dict[str, Row] = {}
        for each in wanted:
            named = f"plan {each.plan}" + (f", render {each.render}" if self.renders > 1 else "")
            first = Row(_number(each.file), each.asked.prompt, self.settings["seed"], self.renders, [])
            rows.setdefault(each.group, first).pictures.append((named, self.folder / each.file))
        return write_grids(self.folder, list(rows.values()))

    def _group(self, asked: PromptToDraw) -> str:
        source = None if asked.source is None else hashlib.sha256(asked.source.read_bytes()).hexdigest()
        return digest([self.settings, self.renders, asked.index, asked.prompt, source])

    def _record(self, picture: Wanted) -> dict[str, Any]:
        source = picture.asked.source
        return {
            "file": picture.file,
            "prompt": picture.asked.prompt,
            "source": None if source is None else str(source),
            "index": picture.asked.index,
            "plan": picture.plan,
            "render": picture.render,
            **self.settings,
            "group": picture.group,
        }


def _number(name: str) -> int:
    """That a picture's name begins with; -1 of any other name."""
    found = re.match(r"(\d+)-", name)
    return int(found[1]) if found else -1


def _end_line(path: Path, file: Any) -> None:
    """Ends the last line, so that the next one stands by itself: a record stays, and what a kill has torn goes."""
    data = path.read_bytes()
    last = data[data.rfind(b"\n") + 1 :]
    if last and is_record(last):
        file.write(b"\n")
    elif last:
        os.truncate(path, len(data) - len(last))
        file.seek(0, os.SEEK_END)
