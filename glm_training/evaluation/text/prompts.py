"""Prompts of CVTG-2K and of LongText-Bench as their authors give them, or in the same form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glm_training.data.json_records import read_json_lines
from glm_training.data.problems import Problem, format_problems
from glm_training.data.text_lines import prompt_fault, read_text
from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.evaluation.text.cvtg import quoted_words
from glm_training.evaluation.text.longtext import Language, units

SOURCE = (
    "CVTG-2K's are the folders CVTG and CVTG-style of CVTG-2K.zip (https://huggingface.co/datasets/dnkdnk/CVTG-2K, "
    "Apache-2.0), LongText-Bench's text_prompts.jsonl and text_prompts_zh.jsonl of "
    "https://github.com/X-Omni-Team/X-Omni (Apache-2.0); the tiny model's is data/benchmarks/text_tiny.jsonl"
)

SETS, AREAS = ("CVTG", "CVTG-style"), ("2", "3", "4", "5")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
_LINE = '{"prompt_id": 0, "prompt": "...", "text": ["..."]}'


@dataclass(frozen=True)
class TextPrompt:
    """name: of its picture, without the ending. wanted: the texts that it asks for, of CVTG-2K the words. group: what
    figures of its own are given for: CVTG-2K's number of areas, LongText-Bench's category."""

    name: str
    prompt: str
    wanted: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class TextPrompts:
    """prompts: in the order of their files. language: how LongText-Bench counts."""

    benchmark: Literal["cvtg", "longtext"]
    prompts: tuple[TextPrompt, ...]
    language: Language = "en"


def read_prompts(path: Path) -> TextPrompts:
    """What `path` holds: CVTG-2K's folder or one of its JSON files, or the lines of LongText-Bench.

    Raises EvaluationError with every fault.
    """
    if not path.exists():
        raise EvaluationError(f"--prompts {path}: there is no such file or folder. {SOURCE}")
    problems: list[Problem] = []
    if path.is_dir():
        prompts = [prompt for file in _files_of(path, problems) for prompt in _cvtg(file, problems)]
        found = TextPrompts("cvtg", tuple(prompts))
    elif _is_cvtg(path):
        found = TextPrompts("cvtg", tuple(_cvtg(path, problems)))
    else:
        found = _longtext(path, problems)
    if not problems and not found.prompts:
        problems.append(Problem(path, "holds no prompts", SOURCE))
    if problems:
        raise EvaluationError(format_problems(problems, heading=f"--prompts {path} cannot be used:"))
    return found


def _files_of(folder: Path, problems: list[Problem]) -> list[Path]:
    """CVTG-2K's files with one entry per prompt; those named `_combined` have the same prompts in another form."""
    sets = [folder / name for name in SETS if (folder / name).is_dir()] or [folder]
    files = [place / f"{area}.json" for place in sets for area in AREAS if (place / f"{area}.json").is_file()]
    if not files:
        problems.append(Problem(folder, "holds neither CVTG/2.json to 5.json nor CVTG-style", SOURCE))
    return files


def _is_cvtg(path: Path) -> bool:
    """Whether it is one JSON object with a "data_list", and no line of a listing."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "data_list" in value


def _cvtg(path: Path, problems: list[Problem]) -> list[TextPrompt]:
    """A file's prompts. Their pictures are SET/AREAS/INDEX.png, as its authors' evaluation reads them."""
    try:
        value = json.loads(path.read_bytes())
        entries = value["data_list"] if isinstance(value, dict) else None
    except (OSError, ValueError, RecursionError, KeyError) as error:
        problems.append(Problem(path, f"is not CVTG-2K's JSON ({type(error).__name__}: {error})", SOURCE))
        return []
    if not isinstance(entries, list):
        problems.append(Problem(path, 'has no list under "data_list"', SOURCE))
        return []
    place = f"{path.resolve().parent.name}/{path.stem}"
    prompts: list[TextPrompt] = []
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        fault = _cvtg_fault(entry, number, seen)
        if fault is not None:
            problems.append(Problem(path, f"data_list[{number}] {fault[0]}", fault[1], index=number))
            continue
        seen[str(entry["index"])] = number
        words = tuple(quoted_words(entry["prompt"]))
        prompts.append(TextPrompt(f"{place}/{entry['index']}", entry["prompt"], words, f"{path.stem} areas"))
    return prompts


def _cvtg_fault(entry: Any, number: int, seen: dict[str, int]) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        return "is no JSON object", 'Write {"index": 0, "prompt": "..."}'
    fault = prompt_fault(entry, "prompt", number)
    if fault is not None:
        return fault
    index = entry.get("index")
    named = str(index)
    if isinstance(index, bool) or not re.fullmatch(r"\w{1,40}", named) or re.search(r"_\d+$", named):
        # NAME_1.png is a second picture of NAME
        return f'has the "index" {index!r}', "Write a number, which names its picture"
    if named in seen:
        return f'repeats the "index" {index} of data_list[{seen[named]}]', "Give each prompt one of its own"
    if not quoted_words(entry["prompt"]):
        return "quotes no text in single quotes", "CVTG-2K's prompts say what to write so: 'Open'"
    return None


def _longtext(path: Path, problems: list[Problem]) -> TextPrompts:
    """A file's prompts. Their pictures are ID.png, or ID_SAMPLE.png, as its authors' evaluation reads them."""
    text = read_text(path)
    problems += text.problems
    values: list[dict[str, Any]] = []
    seen: dict[int, int] = {}
    for record in read_json_lines(text.lines, f"Write {_LINE}"):
        line = record.line
        if line.text is None:
            continue
        fault = record.fault or _longtext_fault(record.value, line.index, seen)
        if fault is not None:
            problems.append(Problem(path, *fault, line=line.number, index=line.index))
            continue
        assert isinstance(record.value, dict)  # else it had a fault
        seen[record.value["prompt_id"]] = line.number
        values.append(record.value)
    language = _language(text for value in values for text in value["text"])
    prompts = [
        TextPrompt(str(value["prompt_id"]), value["prompt"], tuple(value["text"]), str(value.get("category", "text")))
        for value in values
    ]
    return TextPrompts("longtext", tuple(prompts), language)


def _longtext_fault(value: Any, index: int, seen: dict[int, int]) -> tuple[str, str] | None:
    if not isinstance(value, dict):
        return "is no JSON object", f"Write {_LINE}"
    fault = prompt_fault(value, "prompt", index)
    if fault is not None:
        return fault
    number = value.get("prompt_id")
    if type(number) is not int or number < 0:
        said = f'has the "prompt_id" {number!r}' if "prompt_id" in value else 'has no "prompt_id"'
        return said, "Write a whole number from 0, which names its picture"
    if number in seen:
        return f'repeats the "prompt_id" {number} of line {seen[number]}', "Give each prompt one of its own"
    texts = value.get("text")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return 'has no list of texts under "text"', 'Write "text": ["what is to be read"]'
    if not units(" ".join(texts), "zh"):
        return 'has no letter or digit in "text"', "Write what is to be read; marks are not counted"
    return None


def _language(texts: Iterable[str]) -> Language:
    """Chinese where at least half of the texts hold a Chinese character: its prompts quote an English word here and
    there."""
    chinese = [_CHINESE.search(text) is not None for text in texts]
    return "zh" if 2 * sum(chinese) >= len(chinese) > 0 else "en"
