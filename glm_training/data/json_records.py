"""Records of a listing in JSON: an object on each line, or one list of them. Faults stay with their record."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glm_training.data.problems import Problem
from glm_training.data.text_lines import TextFile, TextLine


@dataclass(frozen=True)
class Record:
    """One entry of a listing: what the JSON at ``line`` says, or why it says nothing (reason and remedy)."""

    line: TextLine
    value: object = None
    fault: tuple[str, str] | None = None


def read_json_lines(lines: Sequence[TextLine], example: str) -> list[Record]:
    """A record per line, an empty one where the encoding is at fault (and reported). ``example``: what a line should
    hold, for remedies."""
    return [_record(line, f"{example} on one line") for line in lines]


def _record(line: TextLine, remedy: str) -> Record:
    if line.text is None:
        return Record(line)
    if line.text == "":
        return Record(line, fault=("the line is empty", f"{remedy}, or remove it"))
    try:
        return Record(line, json.loads(line.text, object_pairs_hook=_unique_keys))
    except json.JSONDecodeError as error:
        return Record(line, fault=(f"not JSON: {error.msg} at column {error.colno}", remedy))
    except _DuplicateKey as error:
        return Record(line, fault=(str(error), "Keep one of them"))
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond the parser's limits
        return Record(line, fault=(f"not readable as JSON: {error}", remedy))


def read_json_list(file: TextFile) -> tuple[list[Record], list[Problem]]:
    """A record per element of the list that ``file`` holds, up to where it stops being one; and what is wrong with the
    file as a whole, its encoding included."""
    records: list[Record] = []
    problems = [replace(problem, index=None) for problem in file.problems]
    text, number, counted = file.text, 1, 0
    try:
        for index, (offset, value) in enumerate(_elements(text)):
            number, counted = number + text.count("\n", counted, offset), offset
            records.append(Record(TextLine(index, value.strip() if isinstance(value, str) else "", number), value))
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}; what comes after it was not read"
        problems.append(Problem(file.path, reason, "Correct it, or write one record per line", line=error.lineno))
    except (ValueError, RecursionError) as error:  # a key twice; a number or a nesting beyond the parser's limits
        problems.append(Problem(file.path, f"not readable as JSON: {error}", "Correct the record"))
    return records, problems


def holds_a_list(text: str) -> bool:
    """Whether ``text`` is one JSON list and nothing else."""
    try:
        for _ in _elements(text):
            pass
    except (ValueError, RecursionError):
        return False
    return True


def _elements(text: str) -> Iterator[tuple[int, object]]:
    """Offset and value of each element of the JSON list ``text``; raises JSONDecodeError where it stops being one."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("the file must hold one list, [{...}, ...]", text, position)
    position = _skip_space(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        value, end = decoder.raw_decode(text, position)
        yield position, value
        position = _skip_space(text, end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise json.JSONDecodeError("expecting ',' or ']'", text, position)
        closed = mark == "]"
        position = position if closed else _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise json.JSONDecodeError("extra data after the list", text, position)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n\r":
        position += 1
    return position


class Doubled(dict[str, object]):
    """A JSON object in which a key comes more than once; ``pairs`` as they stand there."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    @property
    def twice(self) -> list[str]:
        """The keys that come more than once."""
        return [key for key, count in Counter(key for key, _ in self.pairs).items() if count > 1]


def keeping_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """As an `object_pairs_hook`: of a key that comes again nothing is lost."""
    record = dict(pairs)
    return record if len(record) == len(pairs) else Doubled(pairs)


class _DuplicateKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = keeping_pairs(pairs)
    if isinstance(record, Doubled):
        raise _DuplicateKey(f"key {record.twice[0]!r} is given twice")
    return record
