"""YAML as plain data: the core schema of YAML 1.2 (`config.scalars`), within bounds, every fault with its line.

Merge keys (`<<`), which YAML 1.2 lacks, are read. Tags other than the core schema's are refused: nothing but plain data
is ever made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from glm_training.config.docs.describe import KeyPath
from glm_training.config.scalars import PATTERNS, TAG, VALUES, StrictLoader

MAX_BYTES = 2**17
"""Of a file. The whole schema written out takes a tenth of it."""

MAX_DEPTH = 32
MAX_ENTRIES = 5000
"""Values of a document once its aliases are written out."""

MAX_DIGITS = 400
"""Of a whole number, which is more than any key takes and few enough to be shown."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_MISSING: Final = object()


@dataclass(frozen=True)
class Fault:
    """Something that cannot be read: where, what is wrong with it, what to write instead."""

    line: int | None
    path: KeyPath
    message: str
    suggestion: str | None = None


@dataclass
class Document:
    """What a text says. `value` lacks what is at fault; `lines`: line, from 1, of each key."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class _Broken(Exception):
    """The text as a whole is no YAML that is read here."""

    def __init__(self, line: int | None, message: str, suggestion: str | None = None) -> None:
        self.fault = Fault(line, (), message, suggestion)


def read_yaml(text: str) -> Document:
    """The one document in `text`; raises nothing."""
    document = Document()
    try:
        node = _compose(text)
        if node is not None:
            value = _Builder(document).build(node, ())
            document.value = None if value is _MISSING else value
    except _Broken as broken:
        return Document(faults=[broken.fault])
    return document


def comment_after(text: str) -> str:
    """The comment behind the value that `text` holds; empty without one. `text` is valid YAML."""
    events = yaml.parse(text, Loader=StrictLoader)
    marks = [event.end_mark for event in events if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent)]
    return text[max((mark.index for mark in marks if mark is not None), default=0) :].strip()


def _compose(text: str) -> yaml.Node | None:
    """The tree of nodes. Raises _Broken."""
    strange = _CONTROL.search(text)
    if strange is not None:
        number = text.count("\n", 0, strange.start()) + 1
        raise _Broken(number, f"not valid YAML: it holds the control character U+{ord(strange[0]):04X}.", "Remove it.")
    loader = StrictLoader(text)
    try:
        _check_shape(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        what = error.context if error.problem == "second occurrence" else error.problem or error.context
        opened = None if error.context_mark is None else error.context_mark.line + 1
        if opened is not None and line is not None and opened < line and error.problem != "second occurrence":
            what = f"{what}, in what line {opened} begins"
        raise _Broken(line, f"not valid YAML: {what}.") from error
    except (ValueError, OverflowError) as error:
        escape = re.search(r"\\U(?!000|0010)", text)
        line = None if escape is None else text.count("\n", 0, escape.start()) + 1
        raise _Broken(line, "not valid YAML: an escape beyond Unicode.") from error
    finally:
        loader.dispose()


def _check_shape(text: str) -> None:
    """Before anything recurses: how deep and how large it is, and that it is one document. Raises _Broken."""
    depth = documents = entries = 0
    for event in yaml.parse(text, Loader=StrictLoader):
        entries += isinstance(event, yaml.NodeEvent)
        if entries > 2 * MAX_ENTRIES:  # keys and values
            raise _Broken(_line(event), f"more than {MAX_ENTRIES} entries.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Broken(_line(event), f"nested more than {MAX_DEPTH} levels deep.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                line = _line(event)
                raise _Broken(line, "another document begins here (`---`), and one is read.", "Give each its own file.")


class _Builder:
    """From nodes to values. What is wrong with one entry is noted, and the others are read all the same."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.around: list[yaml.Node] = []
        self.entries = 0
        self.line = 1  # of the nearest key
        self.furthest = 1  # line read so far: what an alias stands for lies before it

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The value of `node`, `_MISSING` where it has none."""
        self.entries += 1
        self.furthest = max(self.furthest, self.line)
        if self.entries > MAX_ENTRIES:
            raise _Broken(self.furthest, f"more than {MAX_ENTRIES} entries, once aliases are written out.")
        if any(node is other for other in self.around):
            raise _Broken(_line(node), f"not valid YAML: `{'.'.join(path)}` contains itself.")
        self.around.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, path)
            if not self._has_tag(node, path, "map" if isinstance(node, yaml.MappingNode) else "seq"):
                return _MISSING
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            items = [self.build(item, path) for item in node.value]
            return [item for item in items if item is not _MISSING]
        finally:
            self.around.pop()

    def _fault(self, path: KeyPath, message: str, suggestion: str | None = None, line: int | None = None) -> None:
        self.document.faults.append(Fault(self.line if line is None else line, path, message, suggestion))

    def _has_tag(self, node: yaml.Node, path: KeyPath, *allowed: str) -> bool:
        if node.tag in [TAG + name for name in allowed]:
            return True
        shown = node.tag.replace(TAG, "!!")
        self._fault(path, f"the tag `{shown}` is not read here.", "Remove it.", _line(node))
        return False

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        allowed = ("str", *VALUES, "merge") if text == "<<" else ("str", *VALUES)  # as a value, `<<` is a text
        if not self._has_tag(node, path, *allowed):
            return _MISSING
        name = node.tag.removeprefix(TAG)
        strange = _CONTROL.search(text)  # from an escape
        line = _line(node)
        if strange is not None:
            what = "half a surrogate pair" if 0xD800 <= ord(strange[0]) < 0xE000 else "the control character"
            self._fault(path, f"holds {what} U+{ord(strange[0]):04X}.", "Remove it.", line)
            return _MISSING
        if name not in VALUES:
            return text
        if PATTERNS[name].match(text) is None and not (name == "float" and PATTERNS["int"].match(text)):
            self._fault(path, f"{text[:40]!r} is no `!!{name}`.", "Remove the tag.", line)
            return _MISSING
        if name == "int" and len(text) > MAX_DIGITS:
            self._fault(path, f"a number of {len(text)} digits.", None, line)
            return _MISSING
        return VALUES[name](text)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        own = [(key, value) for key, value in node.value if key.tag != f"{TAG}merge"]
        for key, value in node.value:
            if key.tag == f"{TAG}merge":
                self.line = _line(key)
                self._merge(tree, value, path)
        first_lines: dict[str, int] = {}
        for key, value in own:
            self.line = line = _line(key)
            if not isinstance(key, yaml.ScalarNode):
                self._fault(path, "a key must be a word, not a list or mapping.", line=line)
                continue
            name = key.value  # `on` and `1` are names here, not true and a number
            here = (*path, name)
            if name in first_lines:
                self._fault(here, f"the key is there twice; the first is in line {first_lines[name]}.", "Remove one.")
            first_lines.setdefault(name, line)
            if here in self.document.lines:  # merged, or there twice
                self._forget(here)
            self.document.lines[here] = line
            built = self.build(value, here)
            self.line = line
            if built is not _MISSING:
                tree[name] = built
        return tree

    def _merge(self, tree: dict[str, Any], value: yaml.Node, path: KeyPath) -> None:
        """What `<<` names, one mapping or several of which the earlier win, where the mapping has no such key yet."""
        line = self.line
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.MappingNode) for node in nodes):
            self._fault((*path, "<<"), "`<<` takes a mapping or a list of mappings.", line=line)
            nodes = []
        for node in reversed(nodes):
            built = self.build(node, path)
            if built is not _MISSING:
                tree |= built
        self.line = line

    def _forget(self, path: KeyPath) -> None:
        """A key that stands over a merged one: the lines below that one are no longer its."""
        for known in [known for known in self.document.lines if known[: len(path)] == path]:
            del self.document.lines[known]


def _line(place: yaml.Node | yaml.Event) -> int:
    assert place.start_mark is not None
    return place.start_mark.line + 1
