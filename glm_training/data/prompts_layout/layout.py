"""What a listing of prompts is, told by its content: plain lines, JSON lines, or one JSON list; whatever its name."""

import json
import re
from typing import Literal

from glm_training.data.json_records import holds_a_list
from glm_training.data.problems import Problem
from glm_training.data.text_lines import TextFile, TextLine

Layout = Literal["prompts", "json lines", "json list"]

RECORD_KEYS = frozenset(
    ("prompt", "prompts", "caption", "text", "target", "file_name", "image", "source", "preferred", "rejected")
)
"""Keys that a record of a listing has. A JSON object without any of them may be meant as a prompt: some models take
their scenes so."""

_MEANT_AS_RECORD = re.compile(
    rf"""(?:^\{{\s*["'\u201c\u201d]?|,\s*["'\u201c\u201d])(?:{"|".join(sorted(RECORD_KEYS))})["'\u201c\u201d]?\s*:""",
    re.IGNORECASE,
)
_OTHER_TEXTS = {
    ".csv": "a CSV table",
    ".tsv": "a table",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".toml": "TOML",
    ".xml": "XML",
}
_REMEDY = 'Write one prompt per line, or one record per line: {"prompt": "...", "target": "images/0.png"}'


def layout_of(file: TextFile) -> Layout | Problem:
    """The layout of ``file``, or why it has none.

    A prompt may begin with a bracket or a quote, so one such line proves nothing: JSON lines are records in more than
    half of the lines, a list is the whole file. A suffix that promises JSON is held to it.
    """
    suffix = file.path.suffix.lower()
    lines = [line for line in file.lines if line.text]
    first = next((line.text or "" for line in lines), "")
    if first.startswith("[") and (suffix == ".json" or holds_a_list(file.text) or _meant_as_list(file.text, lines)):
        return "json list"
    records = sum(map(is_record, lines))
    if 2 * records > len(lines) or suffix in (".jsonl", ".ndjson"):
        return "json lines"
    if suffix == ".json" or first in ("{", "["):
        return _no_listing(file, lines)
    return _no_prompts(file, first, lines) or "prompts"


def is_record(line: TextLine) -> bool:
    """Whether the line is a JSON object as listings hold them, or was meant as one: with another case of its keys,
    other quotation marks or a comma at its end."""
    text = line.text or ""
    if not text.startswith("{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _MEANT_AS_RECORD.search(text) is not None
    return isinstance(value, dict) and not RECORD_KEYS.isdisjoint(map(str.lower, value))


def _meant_as_list(text: str, lines: list[TextLine]) -> bool:
    """Whether ``text`` opens and closes as a JSON list does, of which something inside is at fault."""
    first = lines[0].text or ""
    opens = re.match(r"\[\s*[\"'{\[]", first) is not None and (len(lines) == 1 or first.endswith((",", "{", "[")))
    return opens and text.rstrip().endswith("]")


def _no_listing(file: TextFile, lines: list[TextLine]) -> Problem:
    """A file that is JSON by its name or first line, and neither records in lines nor a list."""
    try:
        value = json.loads(file.text)
    except json.JSONDecodeError as error:
        if lines and all((line.text or "").startswith("{") for line in lines):  # objects without a known key
            return Problem(file.path, "its JSON records have no key 'prompt'", _REMEDY, line=lines[0].number)
        return Problem(file.path, f"not JSON: {error.msg} at column {error.colno}", _REMEDY, line=error.lineno)
    except (ValueError, RecursionError) as error:
        return Problem(file.path, f"not readable as JSON: {error}", _REMEDY)
    kind = "object" if isinstance(value, dict) else type(value).__name__
    return Problem(file.path, f"holds one JSON {kind}, not a list of prompts", _REMEDY)


def _no_prompts(file: TextFile, first: str, lines: list[TextLine]) -> Problem | None:
    """Plain lines that are something else than prompts: a table, by its first line, or another format, by its name."""
    kind = _OTHER_TEXTS.get(file.path.suffix.lower())
    names = [name.strip().strip("\"'").lower() for name in re.split(r"[,;|\t]", first)]
    words = ("prompt", "prompts", "caption", "captions", *(["text"] if len(names) > 1 else []))
    heads_a_table = (
        len(lines) > 1 and all(re.fullmatch(r"[\w.-]+", name) for name in names) and any(map(words.count, names))
    )
    if heads_a_table:
        return Problem(file.path, f"is a table, with the columns {', '.join(names)}", f"It is not read. {_REMEDY}", 1)
    tabs = [(line.text or "").count("\t") for line in lines]
    if len(lines) > 1 and min(tabs) == max(tabs) > 0:
        reason = f"is a table, each line with {tabs[0] + 1} columns between tabs"
        return Problem(file.path, reason, f"It is not read. {_REMEDY}", lines[0].number)
    if len(lines) > 1 and re.fullmatch(r"(?:prompts?|captions?)\s*:", first, re.IGNORECASE):
        return Problem(file.path, "is YAML, not a text of prompts", _REMEDY, lines[0].number)
    return None if kind is None else Problem(file.path, f"is named as {kind}, not as a text of prompts", _REMEDY)
