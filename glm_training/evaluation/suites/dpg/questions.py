"""DPG-Bench's files: prompts, a text file each, and the questions, a CSV; every fault is told before anything is
drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_training.data.problems import Problem, format_problems
from glm_training.data.text_lines import read_text, text_fault
from glm_training.evaluation.suites.protocol import EvaluationError

SOURCE = (
    "DPG-Bench's own are dpg_bench/prompts and dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA "
    "(Apache-2.0); the tiny model's are data/benchmarks/dpg_tiny"
)
QUESTION = ("question_natural_language", "question")
"""How the column with the question is called, there and in later copies."""

_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple")


@dataclass(frozen=True)
class Question:
    """A line of the CSV. parents: questions of the same item that must be answered with yes."""

    id: int
    parents: tuple[int, ...]
    named: str
    question: str
    line: int

    def recorded(self) -> dict[str, Any]:
        """As the rules read it."""
        return {"id": self.id, "parents": list(self.parents), "tuple": self.named, "question": self.question}


def key_of(name: str) -> str:
    """The item that a file belongs to: its name up to the first dot."""
    return name.split(".")[0]


def read_prompts(folder: Path) -> dict[str, str]:
    """Name (without .txt) -> first line, in the order of the names. Raises EvaluationError with every faulty file."""
    if not folder.is_dir():
        raise EvaluationError(f"--prompts {folder}: there is no such folder of .txt files. {SOURCE}")
    prompts: dict[str, str] = {}
    items: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in sorted(path for path in folder.glob("*.txt") if not path.name.startswith(".")):
        text = read_text(path)
        problems += text.problems[:1]
        line = (text.lines[0].text if text.lines else "") or ""
        fault = None if text.problems else text_fault(line, len(prompts))
        if fault is not None:
            problems.append(Problem(path, "has no prompt in its first line", "Write it there", line=1))
        key = key_of(path.name)
        if key in items:
            problems.append(Problem(path, f"is of the item {key}, as {items[key].name} is", "Rename one of them"))
        items.setdefault(key, path)
        prompts[path.name.removesuffix(".txt")] = line
    if not prompts:
        raise EvaluationError(f"--prompts {folder} holds no .txt files. {SOURCE}")
    if problems:
        raise EvaluationError(format_problems(problems, heading=f"--prompts {folder} cannot be used:"))
    return prompts


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Item -> its questions, in the order of the file. Raises EvaluationError with every faulty line."""
    if not path.is_file():
        raise EvaluationError(f"--questions {path}: there is no such file. {SOURCE}")
    text = read_text(path)
    problems = list(text.problems)
    items: dict[str, list[Question]] = {}
    if not problems:
        problems += _read(path, text.text, items)
    for questions in items.values():
        problems += _kin(path, questions)
    if problems:
        problems.sort(key=lambda problem: problem.line or 0)
        raise EvaluationError(format_problems(problems, heading=f"--questions {path} cannot be used:"))
    return items


def _read(path: Path, text: str, items: dict[str, list[Question]]) -> list[Problem]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # a line separator of Unicode ends no line
    problems: list[Problem] = []
    begun = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        asked = next((name for name in QUESTION if name in header), None)
        lacking = [name for name in _COLUMNS if name not in header] + ([] if asked else [QUESTION[0]])
        if lacking:
            return [Problem(path, f"has no column {', '.join(lacking)}", f"Name the benchmark's CSV. {SOURCE}", line=1)]
        begun = reader.line_num + 1
        for cells in reader:
            fault = _take(dict(zip(header, cells, strict=False)), cells, header, asked or "", begun, items)
            if fault is not None:
                problems.append(Problem(path, *fault, line=begun))
            begun = reader.line_num + 1
    except csv.Error as error:
        problems.append(Problem(path, f"is no CSV from here on ({error})", "Close the quotation marks", line=begun))
    if not items and not problems:
        problems.append(Problem(path, "holds no questions", SOURCE))
    return problems


def _take(
    row: Mapping[str, str], cells: list[str], header: list[str], asked: str, line: int, items: dict[str, list[Question]]
) -> tuple[str, str] | None:
    """Adds a row's question to its item, or says what is wrong with it."""
    if not any(cell.strip() for cell in cells):
        return "is empty", "Remove the line"
    if len(cells) != len(header):
        return f"has {len(cells)} cells where the first line has {len(header)}", "Put texts with commas in quotes"
    item, named, question = row["item_id"].strip(), row["tuple"].strip(), row[asked].strip()
    if not item:
        return "has no item_id", "Write the name of the item's prompt, without .txt"
    if not named or not question:
        return f"has no {'tuple' if not named else asked}", "Write it"
    try:
        number = int(row["proposition_id"])
        parents = tuple(parent for cell in row["dependency"].split(",") if (parent := int(cell)) != 0)
    except ValueError:
        said = f"proposition_id {row['proposition_id']!r}, dependency {row['dependency']!r}"
        return f"has {said}", "Write a number, and numbers with commas between them (0: depends on none)"
    same = next((other for other in items.get(item, ()) if other.id == number), None)
    if same is not None:
        return f"is question {number} of {item}, as line {same.line} is", "Number the questions of an item"
    items.setdefault(item, []).append(Question(number, parents, named, question, line))
    return None


def _kin(path: Path, questions: list[Question]) -> list[Problem]:
    """What is wrong with the dependencies of an item."""
    known = {question.id: question for question in questions}
    problems = []
    for question in questions:
        for parent in question.parents:
            if parent not in known:
                reason = f"depends on question {parent}, which its item does not have"
                problems.append(
                    Problem(path, reason, "Correct the dependency (0: depends on none)", line=question.line)
                )
        seen: set[int] = set()
        above = list(question.parents)
        while above:
            parent = above.pop()
            if parent in known and parent not in seen:
                seen.add(parent)
                above += known[parent].parents
        if question.id in seen:
            problems.append(Problem(path, "depends on itself in the end", "Break the circle", line=question.line))
    return problems
