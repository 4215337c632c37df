"""Prompts to draw, of a file in any layout that training data have: plain lines, JSON lines, a JSON list, or CSV.

Records may hold what they like besides their prompt; a picture to edit is named beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from glm_training.data.captioned.layouts.tables.columns import CAPTIONS, SOURCES, plain
from glm_training.data.captioned.layouts.tables.text_tables import TableHead, table_head, table_rows
from glm_training.data.json_records import read_json_lines, read_json_list
from glm_training.data.paths import PathRefused, path_below
from glm_training.data.problems import DataError, Problem
from glm_training.data.prompts_layout.layout import layout_of
from glm_training.data.prompts_layout.listing import NUMBERED_SUFFIXES
from glm_training.data.prompts_layout.metadata import metadata_in
from glm_training.data.text_lines import TextFile, read_text, text_fault

_REMEDY = f"Name its key or column {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}"


@dataclass(frozen=True)
class PromptToDraw:
    """A prompt, and the picture to edit where there is one. index: its place in the file, from 0."""

    index: int
    prompt: str
    source: Path | None = None


def prompts_to_draw(file: str | Path) -> list[PromptToDraw]:
    """The prompts of `file`, or of the `metadata.jsonl` in a folder. All of them have a source, or none has.

    Raises DataError with every problem, each with its line.
    """
    path = Path(file)
    if path.is_dir():
        found = metadata_in(path)
        if isinstance(found, Problem):
            raise DataError([found])
        path = found
    text = read_text(path)
    problems: list[Problem] = list(text.problems)
    prompts: list[PromptToDraw] = []
    for index, (line, value) in enumerate(_entries(text, problems)):
        read = _read(path, index, line, value)
        if isinstance(read, Problem):
            problems.append(read)
        else:
            prompts.append(read)
    sources = [each.source for each in prompts if each.source is not None]
    if not problems and 0 < len(sources) < len(prompts):
        reason = f"{len(sources)} of {len(prompts)} records name a picture to edit"
        problems.append(Problem(path, reason, "Let all of them name one, or none"))
    if not problems and not prompts:
        problems.append(Problem(path, "holds no prompt", "Write one prompt per line"))
    if problems:
        raise DataError(problems)
    return prompts


def with_numbered_sources(prompts: list[PromptToDraw], folder: Path) -> list[PromptToDraw]:
    """The prompts with `folder/<index>.png` (or .jpg, .jpeg, .webp) as what they edit. Raises DataError, naming every
    one that is missing."""
    problems, found = [], []
    for each in prompts:
        places = [folder / f"{each.index}{suffix}" for suffix in NUMBERED_SUFFIXES]
        there = [place for place in places if place.is_file()]
        if len(there) == 1:
            found.append(PromptToDraw(each.index, each.prompt, there[0]))
        else:
            named = f"has no picture of index {each.index}" if not there else f"has several of index {each.index}"
            problems.append(Problem(folder, named, f"Put one there, as {places[0].name}", index=each.index))
    if problems:
        raise DataError(problems)
    return found


def _entries(text: TextFile, problems: list[Problem]) -> Iterator[tuple[int, object]]:
    """Line and content of each entry: a text or a record."""
    if not text.lines:
        return
    layout = layout_of(text)
    if isinstance(layout, Problem):
        head = table_head(text.path)
        if head is None or head.kind != "csv" or not any(plain(name) in CAPTIONS for name in head.columns):
            problems.append(layout)
            return
        yield from _csv(text.path, head, problems)
    elif layout == "prompts":
        yield from ((line.number, line.text) for line in text.lines if line.text is not None)
    else:
        if layout == "json list":
            records, more = read_json_list(text)
            problems += [problem for problem in more if problem not in problems]
        else:
            records = read_json_lines(text.lines, 'Write {"prompt": "..."}')
        for record in records:
            if record.fault is not None:
                problems.append(Problem(text.path, *record.fault, line=record.line.number))
            elif record.line.text is not None:
                yield record.line.number, record.value


def _csv(path: Path, head: TableHead, problems: list[Problem]) -> Iterator[tuple[int, object]]:
    try:
        for row in table_rows(path, head):
            if row.values is None:
                problems.append(Problem(path, row.fault, "Correct the record", line=row.number))
            else:
                yield row.number, row.values
    except DataError as error:
        problems += error.problems


def _read(path: Path, index: int, line: int, value: object) -> PromptToDraw | Problem:
    """The prompt of an entry, or what is wrong with it."""
    prompt, source = value, None
    if isinstance(value, Mapping):
        own = {plain(str(name)): content for name, content in reversed(list(value.items()))}
        prompt = next((own[name] for name in CAPTIONS if name in own), None)
        named = next((own[name] for name in SOURCES if name in own), None)
        try:
            source = None if named is None else path_below(path.parent, str(named))
        except PathRefused as refusal:
            return Problem(path, f"source {refusal.reason}", refusal.remedy, line=line, index=index)
    if not isinstance(prompt, str):
        return Problem(path, "the record has no prompt", _REMEDY, line=line, index=index)
    fault = text_fault(prompt, index)
    if fault is not None:
        return Problem(path, *fault, line=line, index=index)
    return PromptToDraw(index, prompt.strip(), source)
