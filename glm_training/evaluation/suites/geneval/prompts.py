"""GenEval's prompts: one JSON object a line, with every fault of the file told before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from glm_training.data.problems import Problem, format_problems
from glm_training.data.text_lines import prompt_fault, read_text
from glm_training.evaluation.suites.geneval.rules import COLORS, RELATIONS, TAGS
from glm_training.evaluation.suites.protocol import EvaluationError

SOURCE = (
    "GenEval's own is prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval (MIT); the tiny "
    "model's is data/benchmarks/geneval_tiny.jsonl"
)

Metadata = dict[str, Any]

_KEYS = ("tag", "include", "exclude", "prompt")
_CLAUSE_KEYS = ("class", "count", "color", "position")
_ASKED_BY_TAG = {"colors": "color", "color_attr": "color", "position": "position"}
"""What a clause of a prompt with this tag asks for; without it the picture would be judged for less than it says."""


def read_prompts(path: Path) -> list[Metadata]:
    """The records of a prompts file, in order. Raises EvaluationError with every faulty line."""
    if not path.exists():
        raise EvaluationError(f"--prompts {path}: there is no such file. {SOURCE}")
    text = read_text(path)
    problems = list(text.problems)
    records: list[Metadata] = []
    lines: dict[str, int] = {}
    for line in text.lines:
        if line.text is None:
            continue
        record, fault = parsed(line.text, line.index)
        if fault is None and record is not None:
            same = json.dumps(record, sort_keys=True)
            if same in lines:
                fault = f"repeats line {lines[same]}", "Remove one of them"
            lines.setdefault(same, line.number)
        if fault is not None:
            problems.append(Problem(path, *fault, line=line.number, index=line.index))
        elif record is not None:
            records.append(record)
    if not problems and not records:
        problems.append(Problem(path, "holds no prompts", SOURCE))
    if problems:
        raise EvaluationError(format_problems(problems, heading=f"--prompts {path} cannot be used:"))
    return records


def parsed(text: str, index: int) -> tuple[Metadata | None, tuple[str, str] | None]:
    """A line's record, and what is wrong with it: reason and remedy."""
    if not text:
        return None, ("is empty", "Remove the line: folders are numbered by lines")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, (f"is not JSON ({error})", "Write one JSON object a line")
    if not isinstance(record, dict):
        return None, ("is not a JSON object", 'Write {"tag": ..., "include": [...], "prompt": ...}')
    return record, prompt_fault(record, "prompt", index) or _fault(record)


def _fault(record: Mapping[str, Any]) -> tuple[str, str] | None:
    if record.get("tag") not in TAGS:
        said = f"has the tag {record['tag']!r}" if "tag" in record else "has no tag"
        return said, f"Write one of {', '.join(TAGS)}"
    include = record.get("include")
    if not isinstance(include, list) or not include:
        return 'has no "include"', 'Write "include": [{"class": "bench", "count": 1}]'
    exclude = record.get("exclude", [])
    if not isinstance(exclude, list):
        return '"exclude" is no list', "Write a list of clauses, or leave it out"
    for key in record:
        near = [] if key in _KEYS else get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        if near:  # what it asks for would count for nothing
            return f"has the key {key!r}", f'Did you mean "{near[0]}"?'
    for name, clauses in (("include", include), ("exclude", exclude)):
        for place, clause in enumerate(clauses):
            fault = _clause_fault(clause, place if name == "include" else 0)
            if fault is not None:
                return f"{name}[{place}] {fault[0]}", fault[1]
    asked = _ASKED_BY_TAG.get(record["tag"])
    if asked is not None and not any(asked in clause for clause in include):
        return f"is of the tag {record['tag']} and asks for no {asked}", f'Write "{asked}" into a clause of "include"'
    return None


def _clause_fault(clause: Any, place: int) -> tuple[str, str] | None:
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str) or not clause["class"].strip():
        return 'has no "class"', 'Write {"class": "bench", "count": 1}'
    unknown = [key for key in clause if key not in _CLAUSE_KEYS]
    if unknown:
        return f"has the unknown key {unknown[0]!r}", f"Known are {', '.join(_CLAUSE_KEYS)}"
    count = clause.get("count")
    if type(count) is not int or count < 1:
        return f'has "count" {count!r}', "Write a whole number from 1"
    if "color" in clause and clause["color"] not in COLORS:
        return f'has "color" {clause["color"]!r}', f"Write one of {', '.join(COLORS)}"
    if "position" in clause:
        position = clause["position"]
        whole = isinstance(position, list) and len(position) == 2 and type(position[1]) is int
        if not whole or position[0] not in RELATIONS or not 0 <= position[1] < place:
            return f'has "position" {position!r}', (
                f"Write [one of {', '.join(RELATIONS)}, the place of an earlier clause, from 0]"
            )
    return None


def classes_of(records: Collection[Metadata]) -> list[str]:
    """Every class that a prompt asks for or excludes, in order of appearance."""
    clauses = [clause for record in records for key in ("include", "exclude") for clause in record.get(key, ())]
    return list(dict.fromkeys(clause["class"] for clause in clauses))
